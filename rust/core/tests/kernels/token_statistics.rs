//! Token statistics: against float64, against themselves on every instruction set, and where logits are extreme.
use crate::support::{noises, same};
use vhead_core::token_statistics::BLOCK;
use vhead_core::{
    Error, Executor, Level, LogitGradients, LogitStatistics, LogitsRule, Pool, Result, Rows, Selected, Serial,
    Statistics, reference,
};

/// Statistics of all rows, in the order of [`Statistics`]' fields.
type Outcome = [Vec<f32>; 6];

#[derive(Clone)]
struct Case {
    vocabulary: usize,
    products: Vec<f32>,
    bias: Option<Vec<f32>>,
    targets: Vec<i64>,
    scale: f64,
    softcap: Option<f64>,
    temperature: f64,
}

impl Case {
    /// Logits of up to about 16 either way.
    fn new(rows: usize, vocabulary: usize) -> Self {
        let products = noises(rows * vocabulary, 21).into_iter().map(|x| x * x * x * 2.0).collect();
        let targets = (0..rows).map(|n| ((n * 7919 + vocabulary - 1) % vocabulary) as i64).collect();
        Self { vocabulary, products, bias: None, targets, scale: 1.0, softcap: None, temperature: 1.0 }
    }

    /// Without a rule, with factors and biases, and with a cap.
    fn rules(&self) -> [Self; 3] {
        let bias = Some(noises(self.vocabulary, 22));
        let affine = Self { bias: bias.clone(), scale: 0.5, temperature: 0.7, ..self.clone() };
        let capped = Self { bias, scale: 1.25, softcap: Some(5.0), temperature: 0.5, ..self.clone() };
        [self.clone(), affine, capped]
    }

    fn rule(&self) -> LogitsRule {
        LogitsRule::new(self.scale, self.softcap, self.temperature)
    }

    fn run(&self, level: Level, executor: &dyn Executor, tile: [usize; 2]) -> Result<Outcome> {
        finish(&self.folded(level, executor, tile, (&[], 0))?)
    }

    /// Log-probabilities of candidates, and the likeliest tokens and theirs.
    fn select(
        &self,
        level: Level,
        executor: &dyn Executor,
        tile: [usize; 2],
        asked: (&[i64], usize),
    ) -> Result<(Vec<f32>, Vec<i64>, Vec<f32>)> {
        let statistics = self.folded(level, executor, tile, asked)?;
        let count = self.targets.len() * asked.1;
        let (mut candidates, mut tokens, mut logprobs) = (vec![7.0; asked.0.len()], vec![7; count], vec![7.0; count]);
        statistics.finish_selected(Selected {
            candidate_logprobs: &mut candidates,
            top_tokens: &mut tokens,
            top_logprobs: &mut logprobs,
        })?;
        Ok((candidates, tokens, logprobs))
    }

    fn folded(
        &self,
        level: Level,
        executor: &dyn Executor,
        [rows, columns]: [usize; 2],
        (candidates, top): (&[i64], usize),
    ) -> Result<LogitStatistics> {
        let count = self.targets.len();
        let mut statistics = LogitStatistics::new(self.rule(), &self.targets, self.bias.clone(), self.vocabulary)?;
        statistics.select(candidates, top)?;
        for column in (0..self.vocabulary).step_by(columns) {
            for row in (0..count).step_by(rows) {
                let size = [rows.min(count - row), columns.min(self.vocabulary - column)];
                let start = row * self.vocabulary + column;
                let stride = [self.vocabulary.cast_signed()];
                let tile = Rows::strided(&self.products, start, &size[..1], &stride, size[1])?;
                statistics.fold_with(level, &tile, row, column, executor)?;
            }
        }
        Ok(statistics)
    }

    /// Logit over temperature in float64.
    fn logit(&self, row: usize, token: usize) -> f64 {
        let bias = self.bias.as_ref().map_or(0.0, |bias| bias[token]);
        let logit = (f64::from(self.products[row * self.vocabulary + token]) + f64::from(bias)) * self.scale;
        self.softcap.map_or(logit, |cap| (logit / cap).tanh() * cap) / self.temperature
    }

    /// Log-probability, entropy, logarithm of the sum of squared probabilities, and top-1, in float64.
    fn exact(&self, row: usize) -> [f64; 4] {
        let z: Vec<f64> = (0..self.vocabulary).map(|token| self.logit(row, token)).collect();
        let peak = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let add = |f: &dyn Fn(f64) -> f64| z.iter().fold(0.0, |sum, z| sum + f(z - peak));
        let log_sum = add(&f64::exp).ln();
        let weighted = add(&|d| if d == f64::NEG_INFINITY { 0.0 } else { d.exp() * d });
        let target = self.targets[row] as usize;
        let first = z.iter().position(|z| *z == peak);
        [
            z[target] - peak - log_sum,
            log_sum - weighted / log_sum.exp(),
            add(&|d| (2.0 * d).exp()).ln() - 2.0 * log_sum,
            f64::from(u8::from(first == Some(target))),
        ]
    }
}

fn finish(statistics: &LogitStatistics) -> Result<Outcome> {
    let mut outcome: Outcome = std::array::from_fn(|_| vec![7.0; statistics.rows()]);
    let [logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum] = &mut outcome;
    statistics.finish(Statistics { logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum })?;
    Ok(outcome)
}

fn equal(a: &Outcome, b: &Outcome) -> bool {
    a.iter().zip(b).all(|(a, b)| same(a, b))
}

#[test]
fn every_level_and_every_tiling_gives_the_same_bits() -> Result<()> {
    for vocabulary in [1, 15, 16, 17, 1023, 1024, 1025, 3000] {
        for case in Case::new(35, vocabulary).rules() {
            let expected = case.run(Level::Scalar, &Serial, [35, vocabulary.next_multiple_of(BLOCK)])?;
            for level in Level::available() {
                for tile in [[35, BLOCK], [4, 2 * BLOCK], [17, 4 * BLOCK]] {
                    assert!(equal(&case.run(level, &Pool::new(2), tile)?, &expected), "{} {vocabulary}", level.name());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_s_statistics_depend_on_that_row_alone() -> Result<()> {
    for case in Case::new(20, 2500).rules() {
        let together = case.run(Level::best(), &Serial, [20, BLOCK])?;
        for row in 0..20 {
            let products = case.products[row * 2500..][..2500].to_vec();
            let alone = Case { products, targets: vec![case.targets[row]], ..case.clone() };
            let alone = alone.run(Level::best(), &Serial, [1, BLOCK])?;
            assert!(together.iter().zip(&alone).all(|(all, one)| same(&all[row..=row], one)));
        }
    }
    Ok(())
}

#[test]
fn statistics_are_those_of_float64() -> Result<()> {
    for case in Case::new(40, 5000).rules() {
        let outcome = case.run(Level::best(), &Serial, [40, BLOCK])?;
        for row in 0..40 {
            for (numbers, exact) in outcome.iter().zip(case.exact(row)) {
                let error = (f64::from(numbers[row]) - exact).abs();
                assert!(error <= 4e-7 * exact.abs().max(2.0), "row {row}: {error} at {exact}");
            }
        }
        let mut faulty = case.clone();
        faulty.products[39 * 5000 + 17] += 30.0;
        let other = faulty.run(Level::best(), &Serial, [40, BLOCK])?;
        assert!((0..3).all(|what| (other[what][39] - outcome[what][39]).abs() > 1e-3), "the check can fail");
    }
    Ok(())
}

#[test]
fn the_first_of_equals_is_top1() -> Result<()> {
    let mut case = Case::new(6, 2100);
    case.products.iter_mut().for_each(|x| *x = x.min(3.0));
    case.products.chunks_mut(2100).for_each(|row| [5, 9, 1500, 2099].into_iter().for_each(|token| row[token] = 4.0));
    case.targets = vec![5, 9, 1500, 2099, 0, 5];
    case.products[5 * 2100 + 2000] = 4.5;
    for level in Level::available() {
        assert_eq!(case.run(level, &Serial, [6, BLOCK])?[3], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
    Ok(())
}

/// A token and its logit.
type Special = (usize, f32);

/// Tokens that cannot come, logits far apart, and logits that are not finite.
#[test]
fn extreme_logits() -> Result<()> {
    const NEVER: f32 = f32::NEG_INFINITY;
    let rows: [(f32, f32, &[Special]); 7] = [
        (NEVER, NEVER, &[(7, 3.0), (1500, 3.0)]),
        (NEVER, 0.0, &[(7, NEVER)]),
        (-1e30, 1e30, &[(7, 0.0)]),
        (-200.0, 90.0, &[(7, -120.0)]),
        (0.0, 0.0, &[(1600, f32::NAN)]),
        (NEVER, 1.0, &[(3, f32::NAN)]),
        (0.0, 0.0, &[(1600, f32::INFINITY)]),
    ];
    let mut case = Case::new(rows.len(), 2050);
    case.targets = vec![7; rows.len()];
    for ((first, second, special), row) in rows.iter().zip(case.products.chunks_mut(2050)) {
        row[..BLOCK].fill(*first);
        row[BLOCK..].fill(*second);
        special.iter().for_each(|(token, logit)| row[*token] = *logit);
    }
    for level in Level::available() {
        let outcome = case.run(level, &Serial, [rows.len(), BLOCK])?;
        for row in 0..4 {
            for (numbers, exact) in outcome.iter().zip(case.exact(row)) {
                let actual = f64::from(numbers[row]);
                assert!(actual == exact || (actual - exact).abs() <= 1e-6 * exact.abs().max(1.0), "{row}");
            }
        }
        for row in 4..7 {
            assert!(outcome[..3].iter().all(|numbers| numbers[row].is_nan()) && outcome[3][row] == 0.0, "{row}");
        }
    }
    Ok(())
}

#[test]
fn no_possible_token_gives_nan() -> Result<()> {
    let mut case = Case::new(1, 1030);
    case.products.fill(f32::NEG_INFINITY);
    let outcome = case.run(Level::best(), &Serial, [1, BLOCK])?;
    assert!(outcome[..3].iter().all(|numbers| numbers[0].is_nan()));
    Ok(())
}

/// `each` candidates of a row, with repetitions: the first and the last token, the target, and others.
fn candidates(case: &Case, each: usize) -> Vec<i64> {
    let of_row = |(n, target): (usize, &i64)| {
        let others = (0..each).map(move |m| (n * 31 + m * 7919) % case.vocabulary);
        let mut tokens: Vec<i64> = others.map(|token| token as i64).collect();
        tokens[0] = case.vocabulary as i64 - 1;
        tokens[each / 2] = 0;
        tokens[each - 1] = *target;
        tokens
    };
    case.targets.iter().enumerate().flat_map(of_row).collect()
}

#[test]
fn selected_tokens_have_the_same_bits_on_every_level_and_tiling() -> Result<()> {
    for vocabulary in [1, 15, 17, 1023, 1024, 1025, 3000] {
        for case in Case::new(35, vocabulary).rules() {
            let (candidates, top) = (candidates(&case, 5), vocabulary.min(20));
            let whole = [35, vocabulary.next_multiple_of(BLOCK)];
            let expected = case.select(Level::Scalar, &Serial, whole, (&candidates, top))?;
            let logprobs = &case.run(Level::Scalar, &Serial, whole)?[0];
            let of_targets: Vec<f32> = expected.0.chunks(5).map(|row| row[4]).collect();
            assert!(same(&of_targets, logprobs), "a candidate that is the target has its log-probability's bits");
            for level in Level::available() {
                for tile in [[35, BLOCK], [4, 2 * BLOCK], [17, 4 * BLOCK]] {
                    let found = case.select(level, &Pool::new(2), tile, (&candidates, top))?;
                    let is_same = same(&found.0, &expected.0) && found.1 == expected.1 && same(&found.2, &expected.2);
                    assert!(is_same, "{} {vocabulary}", level.name());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn selected_tokens_are_those_of_the_twin() -> Result<()> {
    const TOP: usize = 50;
    for case in Case::new(20, 5000).rules() {
        let asked = candidates(&case, 32);
        let found = case.select(Level::best(), &Serial, [20, BLOCK], (&asked, TOP))?;
        for row in 0..20 {
            let logits: Vec<f64> = (0..5000).map(|token| case.logit(row, token)).collect();
            let asked: Vec<usize> = asked[row * 32..][..32].iter().map(|token| *token as usize).collect();
            let twin = reference::selected(&logits, &asked, TOP);
            let close = |ours: &[f32], exact: &[f64]| {
                ours.iter().zip(exact).all(|(a, b)| (f64::from(*a) - b).abs() <= 4e-7 * b.abs().max(2.0))
            };
            assert!(close(&found.0[row * 32..][..32], &twin.candidate_logprobs), "{row}");
            assert!(close(&found.2[row * TOP..][..TOP], &twin.top_logprobs), "{row}");
            assert!(!close(&found.2[row * TOP + 1..][..TOP - 1], &twin.top_logprobs), "the check can fail");
            // Where float32 rounds two logits to one, their order is another than the twin's, but not their logits.
            for (ours, exact) in found.1[row * TOP..][..TOP].iter().zip(&twin.top_tokens) {
                assert!((logits[*ours as usize] - logits[*exact]).abs() <= 4e-6, "{row} {ours}");
            }
        }
    }
    Ok(())
}

#[test]
fn equally_likely_tokens_come_in_the_order_of_their_ids() -> Result<()> {
    let mut case = Case::new(2, 2100);
    case.products.iter_mut().for_each(|x| *x = x.min(3.0));
    case.products[..2100].fill(-0.0);
    [5, 9, 1500].into_iter().for_each(|token| case.products[token] = 0.0);
    [2099, 1500, 17, 16].into_iter().for_each(|token| case.products[2100 + token] = 4.0);
    case.products[2100 + 1200] = 4.5;
    for level in Level::available() {
        let (_, tokens, logprobs) = case.select(level, &Serial, [2, BLOCK], (&[], 5))?;
        assert_eq!(tokens, [0, 1, 2, 3, 4, 1200, 16, 17, 1500, 2099], "{}", level.name());
        assert!(logprobs[6..].iter().all(|x| *x == logprobs[6]) && logprobs[5] > logprobs[6]);
    }
    Ok(())
}

#[test]
fn tokens_that_cannot_come_and_rows_that_say_nothing() -> Result<()> {
    const NEVER: f32 = f32::NEG_INFINITY;
    let mut case = Case::new(5, 1500);
    for (row, products) in case.products.chunks_mut(1500).enumerate() {
        products.fill(NEVER);
        products[1100] = 2.0;
        products[3] = [0.0, f32::NAN, f32::INFINITY, NEVER, 5.0][row];
    }
    case.products[4 * 1500 + 1100] = NEVER;
    case.products[4 * 1500 + 3] = NEVER;
    let candidates: Vec<i64> = [1100, 7].repeat(5);
    for level in Level::available() {
        let (found, tokens, logprobs) = case.select(level, &Serial, [5, BLOCK], (&candidates, 3))?;
        assert_eq!(tokens[..3], [1100, 3, 0]);
        assert_eq!([found[1], logprobs[2]], [NEVER; 2]);
        assert!(found[0].is_finite() && logprobs[..2].iter().all(|x| x.is_finite()));
        for row in [1, 2, 4] {
            assert_eq!(tokens[row * 3..][..3], [-1; 3], "{row}");
            let numbers = found[row * 2..][..2].iter().chain(&logprobs[row * 3..][..3]);
            assert!(numbers.into_iter().all(|x| x.is_nan()), "{row}");
        }
        assert_eq!((&tokens[9..12], logprobs[9], logprobs[10]), (&[1100, 0, 1][..], 0.0, NEVER));
    }
    Ok(())
}

#[test]
fn a_selection_that_does_not_fit_is_refused() -> Result<()> {
    let case = Case::new(4, 2000);
    let mut statistics = LogitStatistics::new(case.rule(), &case.targets, None, 2000)?;
    let outside = |row, token| Err(Error::Token { what: "candidates", row, token, vocabulary: 2000 });
    assert_eq!(statistics.select(&[0, 1, 2, 3, 2000, 5, 6, 7], 0), outside(2, 2000));
    assert_eq!(statistics.select(&[0, -1, 2, 3], 0), outside(1, -1));
    let wrong = |what, expected, actual| Err(Error::Length { what, expected, actual });
    assert_eq!(statistics.select(&[0; 6], 0), wrong("candidates", 4, 6));
    assert_eq!(statistics.select(&[], 2001), wrong("top", 2000, 2001));
    statistics.select(&[0; 8], 3)?;
    let (mut numbers, mut tokens) = ([0.0; 12], [0; 11]);
    let (candidate_logprobs, top_logprobs) = numbers.split_at_mut(8);
    let to = Selected { candidate_logprobs, top_tokens: &mut tokens, top_logprobs };
    assert_eq!(statistics.finish_selected(to), wrong("top_tokens", 12, 11));
    Ok(())
}

/// Gradients of `sum(grad_logprob * logprob + grad_entropy * entropy)` by the products.
fn gradients(case: &Case, level: Level, upstream: [&[f32]; 2], columns: usize) -> Result<Vec<f32>> {
    let outcome = case.run(level, &Serial, [case.targets.len(), BLOCK])?;
    let statistics = [&outcome[4][..], &outcome[5], &outcome[1]];
    let bias = case.bias.clone();
    let of = LogitGradients::new(case.rule(), &case.targets, bias, case.vocabulary, statistics, upstream)?;
    let mut all = vec![0.0; case.products.len()];
    for column in (0..case.vocabulary).step_by(columns) {
        let width = columns.min(case.vocabulary - column);
        let part = |row: &[f32]| row[column..column + width].to_vec();
        let mut tile: Vec<f32> = case.products.chunks(case.vocabulary).flat_map(part).collect();
        of.differentiate_with(level, &mut tile, width, 0, column, &Pool::new(2))?;
        for (row, tile) in all.chunks_mut(case.vocabulary).zip(tile.chunks(width)) {
            row[column..column + width].copy_from_slice(tile);
        }
    }
    Ok(all)
}

#[test]
fn gradients_are_those_of_float64() -> Result<()> {
    const VOCABULARY: usize = 1100;
    let upstream = [noises(9, 31), noises(9, 32)];
    let upstream = [&upstream[0][..], &upstream[1][..]];
    for case in Case::new(9, VOCABULARY).rules() {
        let expected = gradients(&case, Level::Scalar, upstream, BLOCK)?;
        for level in Level::available() {
            assert!(same(&gradients(&case, level, upstream, BLOCK)?, &expected), "{}", level.name());
            assert!(same(&gradients(&case, level, upstream, 2 * BLOCK)?, &expected), "{}", level.name());
        }
        for row in 0..9 {
            let [logprob, entropy, ..] = case.exact(row);
            let target = case.targets[row] as usize;
            let log_total = case.logit(row, target) - logprob;
            for token in 0..VOCABULARY {
                let logp = case.logit(row, token) - log_total;
                let hit = f64::from(u8::from(token == target));
                let of_logit = f64::from(upstream[0][row]) * (hit - logp.exp())
                    - f64::from(upstream[1][row]) * logp.exp() * (logp + entropy);
                let bend =
                    case.softcap.map_or(1.0, |cap| 1.0 - (case.logit(row, token) * case.temperature / cap).powi(2));
                let exact = of_logit * bend * case.scale / case.temperature;
                let actual = f64::from(expected[row * VOCABULARY + token]);
                assert!((actual - exact).abs() <= 2e-5 * exact.abs() + 1e-7, "{row} {token}: {actual} {exact}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let case = Case::new(4, 2000);
    let rule = case.rule();
    let target = |row, token| Err(Error::Token { what: "targets", row, token, vocabulary: 2000 });
    assert_eq!(LogitStatistics::new(rule, &[0, 2000], None, 2000).map(|_| ()), target(1, 2000));
    assert_eq!(LogitStatistics::new(rule, &[-100], None, 2000).map(|_| ()), target(0, -100));
    let wrong = |what, expected, actual| Err(Error::Length { what, expected, actual });
    assert_eq!(LogitStatistics::new(rule, &[0], Some(vec![0.0; 3]), 2000).map(|_| ()), wrong("bias", 2000, 3));
    let mut statistics = LogitStatistics::new(rule, &case.targets, None, 2000)?;
    let tile = Rows::contiguous(&case.products, 4, 2000)?;
    let mut fold = |row, column| statistics.fold(&tile, row, column, &Serial);
    assert_eq!(fold(1, 0), wrong("rows", 3, 4));
    assert_eq!(fold(0, 1024), wrong("columns", 976, 2000));
    assert_eq!(fold(0, 16), wrong("column", 0, 16));
    let numbers = [0.0; 4];
    let short = [&numbers[..], &numbers, &numbers[..3]];
    let gradients = LogitGradients::new(rule, &case.targets, None, 2000, short, [&numbers, &numbers]);
    assert_eq!(gradients.map(|_| ()), wrong("entropy", 4, 3));
    Ok(())
}
