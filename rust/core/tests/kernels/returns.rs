//! Advantages, returns and token rewards, on every instruction set.
use crate::support::{noises, same};
use vhead_core::reference;
use vhead_core::returns::{
    Discounts, Kl, Masked, Moments, Penalty, Rollouts, explained_variance, gae, gae_with, rescale, token_rewards,
};
use vhead_core::{Error, Executor, Level, Place, Pool, Result, Serial};

/// Rollouts of lengths around every boundary, with masks of short and of long runs.
struct Case {
    offsets: Vec<i64>,
    rewards: Vec<f32>,
    values: Vec<f32>,
    bootstrap: Vec<f32>,
    mask: Vec<u8>,
}

impl Case {
    fn new(run: usize) -> Self {
        let lengths = [0, 1, 7, 8, 23, 24, 25, 63, 64, 65, 511, 512, 513, 536, 1025, 3000, 0];
        let offsets: Vec<i64> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, length| {
                *sum += length;
                Some(*sum)
            }))
            .collect();
        let tokens = *offsets.last().unwrap_or(&0) as usize;
        let written = noises(tokens / run + 1, 4);
        Self {
            rewards: noises(tokens, 1),
            values: noises(tokens, 2),
            bootstrap: noises(lengths.len(), 3),
            mask: (0..tokens).map(|t| u8::from(written[t / run] > -0.5)).collect(),
            offsets,
        }
    }

    fn rollouts(&self) -> Result<Rollouts<'_>> {
        Rollouts::new(&self.offsets, Some(&self.mask))
    }

    fn run(&self, level: Level, executor: &dyn Executor, lams: [f64; 2], masked: Masked) -> Result<[Vec<f32>; 2]> {
        let (mut advantages, mut returns) = (vec![7.0; self.rewards.len()], vec![7.0; self.rewards.len()]);
        let [lam, value_lam] = lams.map(|lam| [lam]);
        let discounts = Discounts { gamma: 0.99, lam: &lam, value_lam: Some(&value_lam) };
        let (rollouts, values) = (self.rollouts()?, Some(self.values.as_slice()));
        let (bootstrap, to) = (Some(self.bootstrap.as_slice()), &mut advantages);
        gae_with(
            level,
            &rollouts,
            &self.rewards,
            values,
            bootstrap,
            &discounts,
            masked,
            to,
            Some(&mut returns),
            executor,
        )?;
        Ok([advantages, returns])
    }

    /// The float64 twin of all rollouts.
    fn reference(&self, lam: f64) -> Vec<f64> {
        let rollouts = self.offsets.windows(2).zip(&self.bootstrap);
        let advantages = rollouts.flat_map(|(bounds, bootstrap)| {
            let range = bounds[0] as usize..bounds[1] as usize;
            let mask: Vec<bool> = self.mask[range.clone()].iter().map(|m| *m != 0).collect();
            let (rewards, values) = (&self.rewards[range.clone()], &self.values[range]);
            reference::advantages(rewards, values, &mask, 0.99, lam, f64::from(*bootstrap))
        });
        advantages.collect()
    }
}

fn close(actual: &[f32], expected: &[f64]) -> bool {
    let near = |(a, e): (&f32, &f64)| (f64::from(*a) - e).abs() <= 2e-7 * e.abs().max(1.0);
    actual.len() == expected.len() && actual.iter().zip(expected).all(near)
}

#[test]
fn advantages_and_returns_are_those_of_the_twin() -> Result<()> {
    for run in [1, 2, 40, 300, 100_000] {
        let case = Case::new(run);
        let [advantages, returns] = case.run(Level::best(), &Serial, [0.95, 1.0], Masked::Zero)?;
        assert!(close(&advantages, &case.reference(0.95)) && !close(&advantages, &case.reference(0.951)), "{run}");
        let at = |(t, advantage): (usize, f64)| f64::from(case.mask[t]) * (advantage + f64::from(case.values[t]));
        let expected: Vec<f64> = case.reference(1.0).into_iter().enumerate().map(at).collect();
        assert!(close(&returns, &expected), "{run}");
    }
    Ok(())
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() -> Result<()> {
    for (run, masked) in [(1, Masked::Zero), (40, Masked::Carried), (300, Masked::Zero)] {
        let case = Case::new(run);
        let expected = case.run(Level::Scalar, &Serial, [0.95, 0.9], masked)?;
        for level in Level::available() {
            for threads in [1, 2, 5] {
                let actual = case.run(level, &Pool::new(threads), [0.95, 0.9], masked)?;
                assert!(same(&actual[0], &expected[0]) && same(&actual[1], &expected[1]), "{level:?} {threads}");
            }
        }
        let other = case.run(Level::Scalar, &Serial, [0.95, 0.900_001], masked)?;
        assert!(same(&other[0], &expected[0]) && !same(&other[1], &expected[1]));
    }
    Ok(())
}

#[test]
fn masked_places_carry_what_the_next_model_token_has() -> Result<()> {
    let case = Case::new(40);
    let [zeros, _] = case.run(Level::best(), &Serial, [0.95, 0.95], Masked::Zero)?;
    let [carried, returns] = case.run(Level::best(), &Serial, [0.95, 0.95], Masked::Carried)?;
    for bounds in case.offsets.windows(2) {
        let mut behind = 0.0;
        for t in (bounds[0] as usize..bounds[1] as usize).rev() {
            behind = if case.mask[t] == 0 { behind } else { zeros[t] };
            assert!(carried[t] == behind && (returns[t] - (behind + case.values[t])).abs() < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn token_rewards_are_those_of_the_twin() -> Result<()> {
    let case = Case::new(1);
    let offsets = [0, 700, 1000];
    let (mask, (logprobs, reference)) = (&case.mask[..1000], (&case.rewards[..1000], &case.values[..1000]));
    let rollouts = Rollouts::new(&offsets, Some(mask))?;
    for kl in [Kl::K1, Kl::K2, Kl::K3, Kl::Abs] {
        let penalty = Penalty { logprobs, ref_logprobs: reference, coefficient: 0.1, kl };
        let mut rewards = vec![7.0; 1000];
        token_rewards(&rollouts, &[2.0, -3.0], Some(&penalty), &mut rewards, &Serial)?;
        let expected = [(0..700, 2.0), (700..1000, -3.0)].into_iter().flat_map(|(range, reward)| {
            let mask: Vec<bool> = mask[range.clone()].iter().map(|m| *m != 0).collect();
            reference::token_rewards(reward, &mask, &logprobs[range.clone()], &reference[range], 0.1, kl)
        });
        assert!(close(&rewards, &expected.collect::<Vec<_>>()), "{kl:?}");
    }
    Ok(())
}

#[test]
fn moments_count_the_model_s_tokens_only() -> Result<()> {
    let (x, mask) = (noises(40_000, 5), noises(40_000, 6).iter().map(|m| u8::from(*m > 0.0)).collect::<Vec<_>>());
    let kept: Vec<f64> = x.iter().zip(&mask).filter(|(_, m)| **m != 0).map(|(x, _)| f64::from(*x)).collect();
    let mean = kept.iter().fold(0.0, |a, b| a + b) / kept.len() as f64;
    let variance = kept.iter().fold(0.0, |a, b| a + (b - mean).powi(2)) / kept.len() as f64;
    let moments = Moments::new(&x, None, Some(&mask), &Pool::new(3))?;
    assert_eq!(moments, Moments::new(&x, None, Some(&mask), &Serial)?, "whoever computes them");
    assert!(moments.count == kept.len() && (moments.mean - mean).abs() < 1e-12);
    assert!((moments.variance - variance).abs() < 1e-12);
    let mut whitened = vec![7.0; x.len()];
    rescale(&x, Some(&mask), [mean, 1.0 / variance.sqrt(), 0.0], &mut whitened, &Serial)?;
    let again = Moments::new(&whitened, None, Some(&mask), &Serial)?;
    assert!(again.mean.abs() < 1e-7 && (again.variance - 1.0).abs() < 1e-6);
    assert!(whitened.iter().zip(&mask).all(|(w, m)| *m != 0 || *w == 0.0));
    assert!((explained_variance(&x, &x, None, &Serial)? - 1.0).abs() < 1e-12);
    assert!(explained_variance(&x, &vec![1.0; x.len()], None, &Serial)?.is_nan());
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error_that_names_it() -> Result<()> {
    let offsets = |offsets| Rollouts::new(offsets, None).err();
    assert_eq!(offsets(&[1, 2]), Some(Error::Offsets { at: 0, before: 0, actual: 1 }));
    assert_eq!(offsets(&[0, 3, 2]), Some(Error::Offsets { at: 2, before: 3, actual: 2 }));
    assert!(offsets(&[]).is_some());
    let mut case = Case::new(1);
    let second = case.offsets[15] as usize + 1234;
    (case.rewards[second], case.mask[second]) = (f32::INFINITY, 1);
    let place = Place::Token { position: 1234, rollout: 15 };
    let error = Error::NotFinite { what: "rewards", value: f32::INFINITY, place };
    assert_eq!(case.run(Level::best(), &Pool::new(2), [0.0, 0.0], Masked::Zero), Err(error.clone()));
    assert_eq!(error.to_string(), "rewards: expected finite numbers, got inf at token 1234 of rollout 15");
    case.mask[second] = 0;
    assert!(case.run(Level::best(), &Serial, [0.5, 0.5], Masked::Zero).is_ok(), "what is masked is not read");

    let (rollouts, discounts) =
        (Rollouts::new(&[0, 2], None)?, Discounts { gamma: 1.0, lam: &[0.5, 0.5], value_lam: None });
    let mut out = [0.0; 2];
    let wrong = gae(&rollouts, &[1.0, 2.0], None, None, &discounts, Masked::Zero, &mut out, None, &Serial);
    assert_eq!(wrong, Err(Error::Length { what: "lam", expected: 1, actual: 2 }));
    let rollouts = Rollouts::new(&[0, 1, 2], Some(&[1, 0]))?;
    let lost = token_rewards(&rollouts, &[1.0, 2.0], None, &mut out, &Serial);
    assert_eq!(lost, Err(Error::NoModelToken { rollout: 1 }));
    Ok(())
}
