//! Token statistics from tiles of logits: the target's log-probability, the distribution's entropy, and more.
//!
//! Products of hidden states and an lm_head's weights come a tile at a time; a tile is read once, while it is in the cache.
//! With `z` a row's logits over temperature ([`LogitsRule`]), `m` their largest and `d = z - m`,
//!
//! * `logprob = d[target] - ln sum exp(d)`;
//! * `entropy = ln sum exp(d) - sum exp(d) d / sum exp(d)`;
//! * `log_sum_p_squared = ln sum exp(d)^2 - 2 ln sum exp(d)`;
//! * `is_top1`: the target is the first of the largest.
//!
//! A row may ask for more tokens: the log-probabilities of `M` candidates, and the `k` likeliest tokens with theirs, which
//! come from the same pass ([`LogitStatistics::select`]).
//!
//! The order of additions: columns are cut into blocks of [`BLOCK`] = 1024. In a block, column `v` belongs to lane `v % 16`;
//! a lane takes its columns in rising order, in float32, relative to the largest logit so far. The 16 lanes are then added
//! in float64, one after the other, and the blocks in rising order, rescaled where a larger logit comes. A logit more than
//! 86 below the largest counts as probability zero. A row's statistics depend on that row's logits alone, bit for bit, on
//! any instruction set.
use crate::matrix_unit::{self, GROUP, Line, Packed, TASK_GROUPS, Unit, with_scratch};
use crate::row_state::RowState;
use crate::simd::token_statistics::{Fold, Tile};
use crate::threads::for_each_chunk;
use crate::token_selection::Selection;
use crate::{Error, Executor, Level, LogitsRule, Result, Rows, allocation};
use half::bf16;
use std::ops::Range;

pub use crate::row_state::BLOCK;

/// Numbers from a row of a block's products to the next: not a power of two, for which a cache has too few places.
const STRIDE: usize = BLOCK + 16;

/// Rows of a tile in a task.
pub(crate) const TASK_ROWS: usize = 16;

/// Where statistics go, `[N]` each.
#[derive(Debug)]
pub struct Statistics<'a> {
    /// The target's log-probability.
    pub logprobs: &'a mut [f32],
    /// Entropy in nats.
    pub entropy: &'a mut [f32],
    /// Logarithm of the sum of squared probabilities.
    pub log_sum_p_squared: &'a mut [f32],
    /// 1 where the target is the first of the most probable tokens, else 0.
    pub is_top1: &'a mut [f32],
    /// The largest logit over temperature.
    pub peak: &'a mut [f32],
    /// Logarithm of the sum of exponentials relative to the peak.
    pub log_sum: &'a mut [f32],
}

/// Where the log-probabilities of candidates and of the likeliest tokens go, contiguous.
#[derive(Debug)]
pub struct Selected<'a> {
    /// `[N, M]`, in the candidates' order.
    pub candidate_logprobs: &'a mut [f32],
    /// `[N, k]`: the likeliest first, of equals the smaller id first; -1 where the row's statistics are NaN.
    pub top_tokens: &'a mut [i64],
    /// `[N, k]`.
    pub top_logprobs: &'a mut [f32],
}

/// Statistics of `N` rows, a tile of logits at a time.
#[derive(Debug, Clone)]
pub struct LogitStatistics {
    rule: LogitsRule,
    targets: Vec<usize>,
    bias: Option<Vec<f32>>,
    vocabulary: usize,
    states: Vec<RowState>,
    /// Candidates of a row, and how many of the likeliest tokens.
    selected: [usize; 2],
}

impl LogitStatistics {
    /// Nothing known yet; `bias` has a number for each token of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Token`] for the first target outside the vocabulary, [`Error::Length`] where `bias` does not fit.
    pub fn new(rule: LogitsRule, targets: &[i64], bias: Option<Vec<f32>>, vocabulary: usize) -> Result<Self> {
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != vocabulary) {
            return Err(Error::Length { what: "bias", expected: vocabulary, actual: bias.len() });
        }
        let states = allocation::filled(RowState::NEW, targets.len())?;
        Ok(Self { rule, targets: checked(targets, vocabulary)?, bias, vocabulary, states, selected: [0; 2] })
    }

    /// Asks for more tokens of each row, before the first tile: `candidates` are `[N, M]`, and `top` is how many of the
    /// likeliest.
    ///
    /// # Errors
    /// [`Error::Token`] for the first candidate outside the vocabulary, [`Error::Length`] where `candidates` are not as many
    /// for each row or `top` is more than the vocabulary, [`Error::Allocation`].
    pub fn select(&mut self, candidates: &[i64], top: usize) -> Result<()> {
        let (rows, vocabulary) = (self.states.len(), self.vocabulary);
        let each = candidates.len().checked_div(rows).unwrap_or(0);
        if each * rows != candidates.len() {
            return Err(Error::Length { what: "candidates", expected: each * rows, actual: candidates.len() });
        }
        if top > vocabulary {
            return Err(Error::Length { what: "top", expected: vocabulary, actual: top });
        }
        for (row, state) in self.states.iter_mut().enumerate() {
            let selection = Selection::new(row, &candidates[row * each..][..each], top, vocabulary)?;
            state.selection = Some(Box::new(selection));
        }
        self.selected = [each, top];
        Ok(())
    }

    /// `N`.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.targets.len()
    }

    /// Adds the products of the rows from `row` on with the tokens from `column` on. Each row's columns come in rising
    /// order, each once, and `column` is a multiple of [`BLOCK`].
    ///
    /// # Errors
    /// [`Error::Length`] where the tile reaches outside rows or vocabulary, or does not start at a block.
    pub fn fold(&mut self, products: &Rows<'_, f32>, row: usize, column: usize, executor: &dyn Executor) -> Result<()> {
        self.fold_with(Level::best(), products, row, column, executor)
    }

    /// [`LogitStatistics::fold`] on a chosen instruction set.
    ///
    /// # Errors
    /// As [`LogitStatistics::fold`].
    pub fn fold_with(
        &mut self,
        level: Level,
        products: &Rows<'_, f32>,
        row: usize,
        column: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        if !level.is_available() {
            return Err(Error::Level(level.name()));
        }
        check_tile(products, [row, column], [self.targets.len(), self.vocabulary])?;
        let bias = self.bias.as_ref().map(|bias| &bias[column..][..products.columns()]);
        let tile = Tile { products, rule: &self.rule, bias, first: column };
        let (states, targets) = (&mut self.states[row..][..products.count()], &self.targets[row..]);
        for_each_chunk(executor, states, TASK_ROWS, |task, states| {
            let first = task * TASK_ROWS;
            let (rows, targets) = (first..first + states.len(), &targets[first..]);
            level.run(Fold { tile: &tile, rows, states, targets });
        });
        Ok(())
    }

    /// Adds the products of all rows' hidden states `[N, H]` with the weights `[v, H]` of the tokens from `column` on, which
    /// the matrix unit multiplies into float32. Columns come as in [`LogitStatistics::fold`].
    ///
    /// # Errors
    /// [`Error::Length`] where sizes do not fit or the tokens do not start at a block, [`Error::Level`] without the unit,
    /// [`Error::Allocation`].
    pub fn fold_products(
        &mut self,
        hidden: &Rows<'_, bf16>,
        weight: &Rows<'_, bf16>,
        column: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        if !matrix_unit::is_available() {
            return Err(Error::Level("amx"));
        }
        if hidden.columns() != weight.columns() {
            return Err(Error::Length { what: "weight", expected: hidden.columns(), actual: weight.columns() });
        }
        if hidden.count() != self.targets.len() {
            return Err(Error::Length { what: "hidden", expected: self.targets.len(), actual: hidden.count() });
        }
        check_start(column, weight.count(), self.vocabulary)?;
        let (mut rows, mut columns) = (Packed::default(), Packed::default());
        rows.pack_rows(hidden, executor)?;
        for first in (0..weight.count()).step_by(BLOCK) {
            let range = first..weight.count().min(first + BLOCK);
            columns.pack_columns(weight, range.clone(), executor)?;
            self.fold_packed(rows.lines(), &columns, column + first..column + range.end, executor);
        }
        Ok(())
    }

    /// Adds the products of packed rows with a block of packed columns.
    fn fold_packed(&mut self, rows: &[Line], columns: &Packed, tokens: Range<usize>, executor: &dyn Executor) {
        let (rule, targets) = (&self.rule, &self.targets);
        let bias = self.bias.as_ref().map(|bias| &bias[tokens.clone()]);
        for_each_chunk(executor, &mut self.states, TASK_GROUPS * GROUP, |task, states| {
            let (unit, first) = (Unit::new(), task * TASK_GROUPS);
            let groups = first..first + states.len().div_ceil(GROUP);
            with_scratch(groups.len() * GROUP * STRIDE, |products| {
                for at in 0..tokens.len().div_ceil(GROUP) {
                    unit.multiply((rows, groups.clone()), (columns, at), (&mut products[at * GROUP..], STRIDE));
                }
                let strides = ([states.len()], [STRIDE.cast_signed()]);
                // SAFETY: the scratch holds these rows, and is borrowed for as long.
                let view = unsafe { Rows::from_raw(products.as_ptr(), &strides.0, &strides.1, tokens.len()) };
                let tile = Tile { products: &view, rule, bias, first: tokens.start };
                let targets = &targets[first * GROUP..][..states.len()];
                Level::best().run(Fold { tile: &tile, rows: 0..states.len(), states, targets });
            });
        });
    }

    /// Writes what the tiles so far amount to.
    ///
    /// # Errors
    /// [`Error::Length`] where an output does not have a number for each row.
    pub fn finish(&self, to: Statistics<'_>) -> Result<()> {
        let expected = self.states.len();
        for (what, output) in [
            ("logprobs", &*to.logprobs),
            ("entropy", &*to.entropy),
            ("log_sum_p_squared", &*to.log_sum_p_squared),
            ("is_top1", &*to.is_top1),
            ("peak", &*to.peak),
            ("log_sum", &*to.log_sum),
        ] {
            if output.len() != expected {
                return Err(Error::Length { what, expected, actual: output.len() });
            }
        }
        for (n, state) in self.states.iter().enumerate() {
            let row = state.finish();
            (to.logprobs[n], to.entropy[n]) = (row.logprob, row.entropy);
            (to.log_sum_p_squared[n], to.is_top1[n]) = (row.log_sum_p_squared, f32::from(u8::from(row.is_top1)));
            (to.peak[n], to.log_sum[n]) = (row.peak, row.log_sum);
        }
        Ok(())
    }

    /// Writes what the tiles so far amount to for the tokens that [`LogitStatistics::select`] asked for.
    ///
    /// # Errors
    /// [`Error::Length`] where an output does not have a number for each of them.
    pub fn finish_selected(&self, to: Selected<'_>) -> Result<()> {
        let [candidates, top] = self.selected;
        for (what, each, actual) in [
            ("candidate_logprobs", candidates, to.candidate_logprobs.len()),
            ("top_tokens", top, to.top_tokens.len()),
            ("top_logprobs", top, to.top_logprobs.len()),
        ] {
            let expected = self.states.len() * each;
            if actual != expected {
                return Err(Error::Length { what, expected, actual });
            }
        }
        for (n, state) in self.states.iter().enumerate() {
            let Some(selection) = &state.selection else { continue };
            let of_candidates = &mut to.candidate_logprobs[n * candidates..][..candidates];
            let (tokens, of_tokens) = (&mut to.top_tokens[n * top..][..top], &mut to.top_logprobs[n * top..][..top]);
            selection.write_candidates(of_candidates);
            selection.write_likeliest(tokens, of_tokens);
            let row = state.finish();
            for number in of_candidates.iter_mut().chain(of_tokens) {
                *number = row.logprob_of(*number);
            }
            if row.log_sum.is_nan() {
                tokens.fill(-1);
            }
        }
        Ok(())
    }
}

pub(crate) fn checked(targets: &[i64], vocabulary: usize) -> Result<Vec<usize>> {
    let mut places = allocation::reserved(targets.len())?;
    for (row, &target) in targets.iter().enumerate() {
        let place = usize::try_from(target).ok().filter(|place| *place < vocabulary);
        places.push(place.ok_or(Error::Token { what: "targets", row, token: target, vocabulary })?);
    }
    Ok(places)
}

pub(crate) fn check_start(column: usize, count: usize, vocabulary: usize) -> Result<()> {
    if !column.is_multiple_of(BLOCK) {
        return Err(Error::Length { what: "column", expected: column / BLOCK * BLOCK, actual: column });
    }
    let room = vocabulary.saturating_sub(column);
    if count > room {
        return Err(Error::Length { what: "columns", expected: room, actual: count });
    }
    Ok(())
}

pub(crate) fn check_tile(products: &Rows<'_, f32>, start: [usize; 2], most: [usize; 2]) -> Result<()> {
    let size = [products.count(), products.columns()];
    if !start[1].is_multiple_of(BLOCK) {
        return Err(Error::Length { what: "column", expected: start[1] / BLOCK * BLOCK, actual: start[1] });
    }
    for (axis, what) in ["rows", "columns"].into_iter().enumerate() {
        let room = most[axis].saturating_sub(start[axis]);
        if size[axis] > room {
            return Err(Error::Length { what, expected: room, actual: size[axis] });
        }
    }
    Ok(())
}
