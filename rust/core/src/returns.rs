//! Advantages and returns of rollouts whose tokens are only partly the model's.
//!
//! Generalised advantage estimation runs from a rollout's last token to its first,
//! `delta[t] = reward[t] + gamma value[next] - value[t]` and `advantage[t] = delta[t] + gamma lam advantage[next]`, where
//! `next` is the next token that the model wrote: the tokens between, which an environment wrote, are no steps. Behind the
//! last one the value is the bootstrap and the advantage 0. Everything is computed in float64 and rounded once.
use crate::reduce::{self, LANES};
use crate::simd::returns::{Advantages, Rescale, Rollout, Sum, Terms};
use crate::threads::{Shared, try_for_each_chunk, try_run};
use crate::{Error, Executor, Level, Place, Result, allocation};
use std::ops::Range;

/// Tokens of a task: enough to forget the cost of a task, few enough to share out evenly.
const TASK_TOKENS: usize = 16 << 10;

/// Which token belongs to which rollout, and who wrote it.
#[derive(Debug, Clone, Copy)]
pub struct Rollouts<'a> {
    offsets: &'a [i64],
    mask: Option<&'a [u8]>,
}

impl<'a> Rollouts<'a> {
    /// Rollout `i` has the tokens `offsets[i]..offsets[i + 1]`; `mask` is not 0 where the model wrote the token, and `None`
    /// where it wrote all of them.
    ///
    /// # Errors
    /// [`Error::Offsets`] where `offsets` do not rise from 0; [`Error::Length`] where `mask` has another length.
    pub fn new(offsets: &'a [i64], mask: Option<&'a [u8]>) -> Result<Self> {
        if offsets.first() != Some(&0) {
            return Err(Error::Offsets { at: 0, before: 0, actual: offsets.first().copied().unwrap_or(-1) });
        }
        if let Some(at) = (1..offsets.len()).find(|&at| offsets[at] < offsets[at - 1]) {
            return Err(Error::Offsets { at, before: offsets[at - 1], actual: offsets[at] });
        }
        let rollouts = Self { offsets, mask };
        mask.map_or(Ok(()), |mask| rollouts.check("mask", mask.len()))?;
        Ok(rollouts)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Tokens of all of them.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.offset(self.count())
    }

    fn offset(&self, i: usize) -> usize {
        // `new` has seen that offsets rise from 0.
        usize::try_from(self.offsets[i]).unwrap_or(0)
    }

    fn range(&self, i: usize) -> Range<usize> {
        self.offset(i)..self.offset(i + 1)
    }

    fn is_of_model(&self, token: usize) -> bool {
        self.mask.is_none_or(|mask| mask[token] != 0)
    }

    fn check(&self, what: &'static str, actual: usize) -> Result<()> {
        same_length(what, self.tokens(), actual)
    }

    /// Runs `task` with ranges of rollouts that have about as many tokens each.
    fn for_each_task(&self, executor: &dyn Executor, task: &(dyn Fn(Range<usize>) -> Result<()> + Sync)) -> Result<()> {
        if executor.threads() == 1 {
            return task(0..self.count());
        }
        let tokens = self.tokens().div_ceil(4 * executor.threads()).clamp(1, TASK_TOKENS);
        // The rollouts whose first token lies in the task's part; empty ones at the very end lie in the last.
        let first = |part: usize| self.offsets[..self.count()].partition_point(|&o| (o as usize) < part * tokens);
        try_run(executor, self.tokens() / tokens + 1, &|part| task(first(part)..first(part + 1)))
    }

    /// The first number that is not finite among those that are read, as an error.
    fn first_not_finite(&self, arrays: &[(&'static str, &[f32])], everywhere: bool) -> Result<()> {
        for rollout in 0..self.count() {
            for token in self.range(rollout).filter(|&token| everywhere || self.is_of_model(token)) {
                if let Some((what, array)) = arrays.iter().find(|(_, array)| !array[token].is_finite()) {
                    let place = Place::Token { position: token - self.offset(rollout), rollout };
                    return Err(Error::NotFinite { what, value: array[token], place });
                }
            }
        }
        Ok(())
    }
}

fn same_length(what: &'static str, expected: usize, actual: usize) -> Result<()> {
    if expected == actual { Ok(()) } else { Err(Error::Length { what, expected, actual }) }
}

/// What future rewards and advantages weigh.
#[derive(Debug, Clone, Copy)]
pub struct Discounts<'a> {
    /// Of one step.
    pub gamma: f64,
    /// Lambda for the advantages: one number, or one for each rollout.
    pub lam: &'a [f64],
    /// Lambda for the returns, likewise; `None`: the same.
    pub value_lam: Option<&'a [f64]>,
}

/// What stands at the places of tokens that the model did not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masked {
    /// 0.
    Zero,
    /// The advantage of the next model token, and the return that this and the own value make.
    Carried,
}

/// Writes the advantages and, where wanted, `returns = advantages + values` of each token; `values` are 0 where `None`.
///
/// # Errors
/// [`Error::Length`] where lengths differ; [`Error::NotFinite`] where a number that is read is not finite.
#[expect(clippy::too_many_arguments, reason = "three inputs, their rules and two outputs")]
pub fn gae(
    rollouts: &Rollouts<'_>,
    rewards: &[f32],
    values: Option<&[f32]>,
    bootstrap: Option<&[f32]>,
    discounts: &Discounts<'_>,
    masked: Masked,
    advantages: &mut [f32],
    returns: Option<&mut [f32]>,
    executor: &dyn Executor,
) -> Result<()> {
    gae_with(Level::best(), rollouts, rewards, values, bootstrap, discounts, masked, advantages, returns, executor)
}

/// [`gae`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`gae`].
#[expect(clippy::too_many_arguments, reason = "as above")]
pub fn gae_with(
    level: Level,
    rollouts: &Rollouts<'_>,
    rewards: &[f32],
    values: Option<&[f32]>,
    bootstrap: Option<&[f32]>,
    discounts: &Discounts<'_>,
    masked: Masked,
    advantages: &mut [f32],
    returns: Option<&mut [f32]>,
    executor: &dyn Executor,
) -> Result<()> {
    let inputs = Inputs { rewards, values, bootstrap, discounts: *discounts, masked };
    inputs.check(rollouts)?;
    rollouts.check("advantages", advantages.len())?;
    returns.as_ref().map_or(Ok(()), |returns| rollouts.check("returns", returns.len()))?;
    let (advantages, returns) = (Shared::new(advantages), returns.map(Shared::new));
    rollouts.for_each_task(executor, &|part| {
        let mut finite = true;
        for i in part {
            let (start, count) = (rollouts.range(i).start, rollouts.range(i).len());
            // SAFETY: rollouts do not overlap, and each is in one task.
            let (advantages, returns) = unsafe {
                (advantages.slice(start, count), returns.as_ref().map(|returns| returns.slice(start, count)))
            };
            let rollout = inputs.rollout(rollouts, i);
            level.run(Advantages { rollout, advantages, returns, finite: &mut finite });
        }
        if finite { Ok(()) } else { inputs.not_finite(rollouts) }
    })
}

#[derive(Clone, Copy)]
struct Inputs<'a> {
    rewards: &'a [f32],
    values: Option<&'a [f32]>,
    bootstrap: Option<&'a [f32]>,
    discounts: Discounts<'a>,
    masked: Masked,
}

impl<'a> Inputs<'a> {
    fn check(&self, rollouts: &Rollouts<'_>) -> Result<()> {
        let per_rollout = |what, lambdas: &[f64]| {
            if lambdas.len() == 1 { Ok(()) } else { same_length(what, rollouts.count(), lambdas.len()) }
        };
        rollouts.check("rewards", self.rewards.len())?;
        self.values.map_or(Ok(()), |values| rollouts.check("values", values.len()))?;
        self.bootstrap.map_or(Ok(()), |values| same_length("bootstrap", rollouts.count(), values.len()))?;
        per_rollout("lam", self.discounts.lam)?;
        self.discounts.value_lam.map_or(Ok(()), |lambdas| per_rollout("value_lam", lambdas))
    }

    fn rollout<'b>(&self, rollouts: &Rollouts<'b>, i: usize) -> Rollout<'b>
    where
        'a: 'b,
    {
        let of_rollout = |lambdas: &[f64]| if lambdas.len() == 1 { lambdas[0] } else { lambdas[i] };
        Rollout {
            rewards: &self.rewards[rollouts.range(i)],
            values: self.values.map(|values| &values[rollouts.range(i)]),
            mask: rollouts.mask.map(|mask| &mask[rollouts.range(i)]),
            gamma: self.discounts.gamma,
            lam: of_rollout(self.discounts.lam),
            value_lam: self.discounts.value_lam.map(of_rollout),
            bootstrap: self.bootstrap.map_or(0.0, |values| values[i]),
            carry: self.masked == Masked::Carried,
        }
    }

    /// Says which number made a rollout's advantages no numbers.
    #[cold]
    fn not_finite(&self, rollouts: &Rollouts<'_>) -> Result<()> {
        if let Some(rollout) = self.bootstrap.and_then(|values| values.iter().position(|value| !value.is_finite())) {
            let value = self.bootstrap.map_or(f32::NAN, |values| values[rollout]);
            return Err(Error::NotFinite { what: "bootstrap", value, place: Place::Rollout(rollout) });
        }
        rollouts.first_not_finite(&[("rewards", self.rewards)], false)?;
        let values = self.values.unwrap_or(self.rewards);
        rollouts.first_not_finite(&[("values", values)], self.masked == Masked::Carried)
    }
}

/// How the divergence of the policy from a reference is estimated at one token, with `d` the difference of their
/// log-probabilities, policy's less reference's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kl {
    /// `d`
    K1,
    /// `d^2 / 2`
    K2,
    /// `exp(-d) - 1 + d`
    K3,
    /// `|d|`
    Abs,
}

impl Kl {
    /// The estimate.
    #[must_use]
    pub fn of(self, difference: f64) -> f64 {
        match self {
            Self::K1 => difference,
            Self::K2 => 0.5 * difference * difference,
            Self::K3 => (-difference).exp_m1() + difference,
            Self::Abs => difference.abs(),
        }
    }
}

/// A penalty for the distance from a reference policy.
#[derive(Debug, Clone, Copy)]
pub struct Penalty<'a> {
    /// The policy's log-probability of each token.
    pub logprobs: &'a [f32],
    /// The reference's.
    pub ref_logprobs: &'a [f32],
    /// What one nat costs.
    pub coefficient: f64,
    /// How it is estimated.
    pub kl: Kl,
}

/// Writes the reward of each token: the rollout's `reward` at its last model token, the penalty at every model token, and 0
/// at all other places.
///
/// # Errors
/// [`Error::Length`] where lengths differ; [`Error::NotFinite`] for a number at a model token that is not finite;
/// [`Error::NoModelToken`] for a rollout without a place for its reward.
pub fn token_rewards(
    rollouts: &Rollouts<'_>,
    reward: &[f32],
    penalty: Option<&Penalty<'_>>,
    rewards: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    same_length("reward", rollouts.count(), reward.len())?;
    rollouts.check("rewards", rewards.len())?;
    if let Some(penalty) = penalty {
        let arrays = [("logprobs", penalty.logprobs), ("ref_logprobs", penalty.ref_logprobs)];
        arrays.iter().try_for_each(|(what, array)| rollouts.check(what, array.len()))?;
        rollouts.first_not_finite(&arrays, false)?;
    }
    let shared = Shared::new(rewards);
    rollouts.for_each_task(executor, &|part| {
        for rollout in part {
            let range = rollouts.range(rollout);
            // SAFETY: rollouts do not overlap, and each is in one task.
            let to = unsafe { shared.slice(range.start, range.len()) };
            let Some(last) = range.clone().rev().find(|&token| rollouts.is_of_model(token)) else {
                return Err(Error::NoModelToken { rollout });
            };
            if !reward[rollout].is_finite() {
                let (value, place) = (reward[rollout], Place::Rollout(rollout));
                return Err(Error::NotFinite { what: "reward", value, place });
            }
            for (to, token) in to.iter_mut().zip(range.clone()) {
                let own = if token == last { f64::from(reward[rollout]) } else { 0.0 };
                let cost = penalty.filter(|_| rollouts.is_of_model(token)).map_or(0.0, |penalty| penalty.at(token));
                *to = (own - cost) as f32;
            }
        }
        Ok(())
    })
}

impl Penalty<'_> {
    fn at(&self, token: usize) -> f64 {
        self.coefficient * self.kl.of(f64::from(self.logprobs[token]) - f64::from(self.ref_logprobs[token]))
    }
}

/// Count, mean and variance of the model's tokens in an array.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    /// How many numbers.
    pub count: usize,
    /// Their mean; NaN where there are none.
    pub mean: f64,
    /// The mean of the squared differences from it.
    pub variance: f64,
}

impl Moments {
    /// Of the model's tokens in `x`, or in `x - minus`.
    ///
    /// # Errors
    /// [`Error::Length`] where lengths differ; [`Error::NotFinite`] where a number that counts is not finite;
    /// [`Error::Allocation`].
    pub fn new(x: &[f32], minus: Option<&[f32]>, mask: Option<&[u8]>, executor: &dyn Executor) -> Result<Self> {
        let same = |what, other: Option<usize>| other.map_or(Ok(()), |length| same_length(what, x.len(), length));
        same("mask", mask.map(<[u8]>::len))?;
        same("values", minus.map(<[f32]>::len))?;
        let terms = Terms { x, minus, mask, mean: 0.0, squared: false };
        let count = mask.map_or(x.len(), |mask| mask.iter().filter(|m| **m != 0).count());
        let mean = sum(terms, executor)? / count as f64;
        if count > 0 && !mean.is_finite() {
            return Err(not_finite(&terms));
        }
        let squares = sum(Terms { mean, squared: true, ..terms }, executor)?;
        Ok(Self { count, mean, variance: squares / count as f64 })
    }
}

#[cold]
fn not_finite(terms: &Terms<'_>) -> Error {
    let arrays = [("x", Some(terms.x)), ("values", terms.minus)];
    let counts = |place: usize| terms.mask.is_none_or(|mask| mask[place] != 0);
    let wrong = arrays.into_iter().find_map(|(what, array)| {
        let (place, value) = array?.iter().enumerate().find(|(place, value)| counts(*place) && !value.is_finite())?;
        Some(Error::NotFinite { what, value: *value, place: Place::Number(place) })
    });
    wrong.unwrap_or(Error::NotFinite { what: "x", value: f32::NAN, place: Place::Number(0) })
}

/// The sum of terms: parts of [`TASK_TOKENS`] in the order of [`reduce`], then the parts, whoever computed them.
fn sum(terms: Terms<'_>, executor: &dyn Executor) -> Result<f64> {
    let length = terms.x.len();
    let mut parts = allocation::filled(0.0_f64, length.div_ceil(TASK_TOKENS))?;
    try_for_each_chunk(executor, &mut parts, 1, |part, out| {
        let places = part * TASK_TOKENS..length.min((part + 1) * TASK_TOKENS);
        let mut lanes = [0.0; LANES];
        let terms = Terms {
            x: &terms.x[places.clone()],
            minus: terms.minus.map(|minus| &minus[places.clone()]),
            mask: terms.mask.map(|mask| &mask[places.clone()]),
            ..terms
        };
        Level::best().run(Sum { terms, lanes: &mut lanes });
        out[0] = reduce::fold(&lanes);
        Ok(())
    })?;
    Ok(parts.iter().fold(0.0, |sum, part| sum + part))
}

/// Writes `shift + scale (x - mean)`; 0 where `mask` is 0.
///
/// # Errors
/// [`Error::Length`] where lengths differ.
pub fn rescale(
    x: &[f32],
    mask: Option<&[u8]>,
    [mean, scale, shift]: [f64; 3],
    to: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    mask.map_or(Ok(()), |mask| same_length("mask", x.len(), mask.len()))?;
    same_length("result", x.len(), to.len())?;
    try_for_each_chunk(executor, to, TASK_TOKENS, |part, to| {
        let places = part * TASK_TOKENS..part * TASK_TOKENS + to.len();
        let (x, mask) = (&x[places.clone()], mask.map(|mask| &mask[places.clone()]));
        Level::best().run(Rescale { x, mask, mean, scale, shift, to });
        Ok(())
    })
}

/// `1 - variance(returns - values) / variance(returns)` over the model's tokens of all rollouts at once; NaN where the
/// returns do not vary.
///
/// # Errors
/// [`Error::Length`] where lengths differ; [`Error::Allocation`].
pub fn explained_variance(
    values: &[f32],
    returns: &[f32],
    mask: Option<&[u8]>,
    executor: &dyn Executor,
) -> Result<f64> {
    let all = Moments::new(returns, None, mask, executor)?;
    let left = Moments::new(returns, Some(values), mask, executor)?;
    Ok(if all.variance == 0.0 { f64::NAN } else { 1.0 - left.variance / all.variance })
}
