//! Gradients of token statistics: what each tile of logits sends back to hidden states, weight and bias.
//!
//! Where torch multiplies, it makes the tiles again, [`LogitGradients::differentiate`] writes their gradients over them, and
//! torch multiplies these. Where the processor's matrix unit does, [`LogitGradients::add_products`] visits each tile once:
//! three products, between which a tile stays in the cache, and no tile is ever in the memory of the caller.
use crate::feed_forward::write_products;
use crate::matrix_unit::{self, GROUP, Line, Packed, STEP, TASK_GROUPS, Unit, with_scratch};
use crate::simd::feed_forward::Round;
use crate::simd::token_statistics::{Differentiate, RowGradient, Tile};
use crate::threads::{Shared, for_each_chunk};
use crate::token_statistics::{BLOCK, TASK_ROWS, check_start, check_tile, checked};
use crate::{Error, Executor, Level, LogitsRule, Result, Rows, allocation};
use half::bf16;
use std::ops::Range;

/// Gradients of log-probabilities and entropies by the products, a tile at a time.
#[derive(Debug, Clone)]
pub struct LogitGradients {
    rule: LogitsRule,
    bias: Option<Vec<f32>>,
    vocabulary: usize,
    states: Vec<RowGradient>,
}

impl LogitGradients {
    /// Of `N` rows: their `statistics` are peak, `log_sum` and entropy as [`LogitStatistics::finish`] wrote them,
    /// `gradients` those of log-probability and entropy.
    ///
    /// # Errors
    /// As [`LogitStatistics::new`], and [`Error::Length`] where there is not a number for each row.
    pub fn new(
        rule: LogitsRule,
        targets: &[i64],
        bias: Option<Vec<f32>>,
        vocabulary: usize,
        statistics: [&[f32]; 3],
        gradients: [&[f32]; 2],
    ) -> Result<Self> {
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != vocabulary) {
            return Err(Error::Length { what: "bias", expected: vocabulary, actual: bias.len() });
        }
        let names = ["peak", "log_sum", "entropy", "grad_logprobs", "grad_entropy"];
        for (what, numbers) in names.into_iter().zip(statistics.into_iter().chain(gradients)) {
            if numbers.len() != targets.len() {
                return Err(Error::Length { what, expected: targets.len(), actual: numbers.len() });
            }
        }
        let row = |(n, target)| RowGradient {
            target,
            peak: statistics[0][n],
            log_sum: statistics[1][n],
            entropy: statistics[2][n],
            grad_logprob: gradients[0][n],
            grad_entropy: gradients[1][n],
        };
        let targets = checked(targets, vocabulary)?;
        let states = allocation::collected(targets.len(), targets.into_iter().enumerate().map(row))?;
        Ok(Self { rule, bias, vocabulary, states })
    }

    /// Overwrites products, `[rows, columns]` contiguous, with their gradients; places as in [`LogitStatistics::fold`].
    ///
    /// # Errors
    /// [`Error::Length`] where the tile reaches outside rows or vocabulary.
    pub fn differentiate(
        &self,
        products: &mut [f32],
        columns: usize,
        row: usize,
        column: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        self.differentiate_with(Level::best(), products, columns, row, column, executor)
    }

    /// [`LogitGradients::differentiate`] on a chosen instruction set.
    ///
    /// # Errors
    /// As [`LogitGradients::differentiate`].
    pub fn differentiate_with(
        &self,
        level: Level,
        products: &mut [f32],
        columns: usize,
        row: usize,
        column: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        if !level.is_available() {
            return Err(Error::Level(level.name()));
        }
        let rows = products.len().checked_div(columns).unwrap_or(0);
        let to = Shared::new(products);
        // SAFETY: the view is of `products`, which is borrowed for as long; a task reads each number before it writes it.
        let view = unsafe { Rows::from_raw(to.as_mut_ptr().cast_const(), &[rows], &[columns.cast_signed()], columns) };
        check_tile(&view, [row, column], [self.states.len(), self.vocabulary])?;
        let bias = self.bias.as_ref().map(|bias| &bias[column..][..columns]);
        let tile = Tile { products: &view, rule: &self.rule, bias, first: column };
        let states = &self.states[row..][..rows];
        executor.run(rows.div_ceil(TASK_ROWS), &|task| {
            let range = task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS);
            let states = &states[range.clone()];
            level.run(Differentiate { tile: &tile, rows: range, states, to: &to, stride: columns });
        });
        Ok(())
    }
}

/// Where gradients of hidden states and weight go.
#[derive(Debug)]
pub struct ProductGradients<'a> {
    /// `[N, H]`, added to what is there; `None`: not asked for.
    pub hidden: Option<&'a mut [f32]>,
    /// `[v, H]`, written; likewise.
    pub weight: Option<&'a mut [bf16]>,
}

impl LogitGradients {
    /// Gradients by the tokens from `column` on of all rows' hidden states `[N, H]` and of these tokens' weights `[v, H]`,
    /// by the matrix unit. Gradients of products are rounded to bfloat16, and their products added in float32.
    ///
    /// # Errors
    /// [`Error::Length`] where sizes do not fit or the tokens do not start at a block, [`Error::Level`] without the unit,
    /// [`Error::Allocation`].
    pub fn add_products(
        &self,
        hidden: &Rows<'_, bf16>,
        weight: &Rows<'_, bf16>,
        column: usize,
        to: ProductGradients<'_>,
        executor: &dyn Executor,
    ) -> Result<()> {
        if !matrix_unit::is_available() {
            return Err(Error::Level("amx"));
        }
        let (rows, width) = (hidden.count(), hidden.columns());
        let lengths = [
            ("weight", width, weight.columns()),
            ("hidden", self.states.len(), rows),
            ("grad_hidden", rows * width, to.hidden.as_ref().map_or(rows * width, |to| to.len())),
            ("grad_weight", weight.count() * width, to.weight.as_ref().map_or(weight.count() * width, |to| to.len())),
        ];
        if let Some((what, expected, actual)) = lengths.into_iter().find(|(_, expected, actual)| expected != actual) {
            return Err(Error::Length { what, expected, actual });
        }
        check_start(column, weight.count(), self.vocabulary)?;
        let mut visit = Visit::new(self, hidden, &to, executor)?;
        let of_weight = to.weight.map(Shared::new);
        for first in (0..weight.count()).step_by(BLOCK) {
            let range = first..weight.count().min(first + BLOCK);
            visit.block(weight, range.clone(), column, executor)?;
            if let Some(to) = &of_weight {
                // SAFETY: these rows of the weight are nobody else's.
                let to = unsafe { to.slice(range.start * width, range.len() * width) };
                visit.write_weight(range.len(), width, to, executor);
            }
        }
        if let Some(to) = to.hidden {
            visit.add_hidden(to, width);
        }
        Ok(())
    }
}

/// What a visit of all tiles needs, block of tokens by block of tokens.
struct Visit<'a> {
    of: &'a LogitGradients,
    rows: Packed,
    /// The hidden states' numbers as columns, where the weight's gradient is asked for.
    states: Option<Packed>,
    /// The block's weights as columns, and their numbers as columns.
    weights: [Packed; 2],
    /// The block's gradients, a row of hidden states after the other, and a token after the other.
    gradients: [Packed; 2],
    /// `[N, H]`, both rounded up to whole groups, where it is asked for.
    hidden: Option<Vec<f32>>,
    width: usize,
}

impl<'a> Visit<'a> {
    fn new(
        of: &'a LogitGradients,
        hidden: &Rows<'_, bf16>,
        to: &ProductGradients<'_>,
        executor: &dyn Executor,
    ) -> Result<Self> {
        let width = hidden.columns().next_multiple_of(GROUP);
        let size = hidden.count().next_multiple_of(GROUP) * width;
        let mut visit = Self {
            of,
            rows: Packed::default(),
            states: to.weight.is_some().then(Packed::default),
            weights: Default::default(),
            gradients: Default::default(),
            hidden: to.hidden.is_some().then(|| allocation::zeros(size)).transpose()?,
            width,
        };
        visit.rows.pack_rows(hidden, executor)?;
        if let Some(states) = &mut visit.states {
            states.pack_numbers(hidden, 0..hidden.count(), executor)?;
        }
        Ok(visit)
    }

    /// The gradients of a block's products, and what they add to the hidden states'; `first` is the token that `range`
    /// counts from.
    fn block(
        &mut self,
        weight: &Rows<'_, bf16>,
        range: Range<usize>,
        first: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        let groups = self.of.states.len().div_ceil(GROUP);
        let [columns, numbers] = &mut self.weights;
        columns.pack_columns(weight, range.clone(), executor)?;
        if self.hidden.is_some() {
            numbers.pack_numbers(weight, range.clone(), executor)?;
        }
        let [by_row, by_token] = &mut self.gradients;
        by_row.resize(groups, range.len())?;
        by_token.resize(range.len().div_ceil(GROUP), groups * GROUP)?;
        let block = Block {
            of: self.of,
            rows: self.rows.lines(),
            columns,
            numbers,
            tokens: first + range.start..first + range.end,
            by_row: by_row.shared(),
            by_token: self.states.is_some().then(|| by_token.shared()),
            row_groups: groups,
        };
        let (tasks, width) = (groups.div_ceil(TASK_GROUPS), self.width);
        let each = TASK_GROUPS * GROUP * width;
        match &mut self.hidden {
            Some(sums) => for_each_chunk(executor, sums, each, |task, sums| block.run(task, Some((sums, width)))),
            None => executor.run(tasks, &|task| block.run(task, None)),
        }
        Ok(())
    }

    /// The gradient of a block's weights, `[count, width]`.
    fn write_weight(&mut self, count: usize, width: usize, to: &mut [bf16], executor: &dyn Executor) {
        if let Some(states) = &self.states {
            let [_, by_token] = &self.gradients;
            write_products(by_token.lines(), count, states, 0..width, &Shared::new(to), width, executor);
        }
    }

    fn add_hidden(&self, to: &mut [f32], width: usize) {
        if let Some(sums) = &self.hidden {
            for (to, sums) in to.chunks_exact_mut(width.max(1)).zip(sums.chunks_exact(self.width.max(1))) {
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
            }
        }
    }
}

/// A block of tokens, whose tiles are visited by tasks of [`TASK_GROUPS`] groups of rows.
struct Block<'a> {
    of: &'a LogitGradients,
    rows: &'a [Line],
    columns: &'a Packed,
    numbers: &'a Packed,
    tokens: Range<usize>,
    by_row: Shared<'a, Line>,
    by_token: Option<Shared<'a, Line>>,
    row_groups: usize,
}

impl Block<'_> {
    fn run(&self, task: usize, sums: Option<(&mut [f32], usize)>) {
        let unit = Unit::new();
        let groups = task * TASK_GROUPS..self.row_groups.min((task + 1) * TASK_GROUPS);
        let each = self.columns_steps() * GROUP;
        // SAFETY: these groups' lines are nobody else's.
        let lines = unsafe { self.by_row.slice(groups.start * each, groups.len() * each) };
        self.differentiate(&unit, groups.clone(), lines);
        if let Some(to) = &self.by_token {
            self.turn(groups.clone(), lines, to);
        }
        if let Some((sums, width)) = sums {
            for at in 0..width / GROUP {
                let to = (&mut sums[at * GROUP..], width);
                unit.multiply_onto((lines, 0..groups.len()), (self.numbers, at), to, true);
            }
        }
    }

    /// Steps of a row of gradients.
    fn columns_steps(&self) -> usize {
        self.tokens.len().div_ceil(STEP)
    }

    /// The gradients of the products of some groups of rows, rounded, with zeros where there is no row or token.
    fn differentiate(&self, unit: &Unit, groups: Range<usize>, lines: &mut [Line]) {
        let (of, steps) = (self.of, self.columns_steps());
        let stride = BLOCK + 16;
        with_scratch(groups.len() * GROUP * stride, |products| {
            for at in 0..steps {
                unit.multiply((self.rows, groups.clone()), (self.columns, at), (&mut products[at * GROUP..], stride));
            }
            let first = groups.start * GROUP;
            let count = (groups.len() * GROUP).min(of.states.len() - first);
            let bias = of.bias.as_ref().map(|bias| &bias[self.tokens.clone()]);
            let to = Shared::new(products);
            let strides = ([count], [stride.cast_signed()]);
            // SAFETY: the scratch holds these rows; each number is read before it is written.
            let view =
                unsafe { Rows::from_raw(to.as_mut_ptr().cast_const(), &strides.0, &strides.1, self.tokens.len()) };
            let tile = Tile { products: &view, rule: &of.rule, bias, first: self.tokens.start };
            let states = &of.states[first..][..count];
            Level::best().run(Differentiate { tile: &tile, rows: 0..count, states, to: &to, stride });
            for (at, line) in lines.iter_mut().enumerate() {
                let (group, step, row) = (at / GROUP / steps, at / GROUP % steps, at % GROUP);
                let from = (group * GROUP + row) * stride + step * STEP;
                if let Some(from) = products[from..].first_chunk() {
                    Level::Avx512.run(Round { from, to: &mut line.0 });
                }
            }
        });
    }

    /// The same lines, token by token: a group of rows is one step of each token's.
    fn turn(&self, groups: Range<usize>, lines: &[Line], to: &Shared<'_, Line>) {
        let steps = self.columns_steps();
        for (group, lines) in groups.zip(lines.chunks_exact(steps * GROUP)) {
            for (token_group, lines) in lines.as_chunks::<GROUP>().0.iter().enumerate() {
                let start = (token_group * self.row_groups + group) * GROUP;
                // SAFETY: this step of these tokens is nobody else's.
                if let Some(to) = unsafe { to.slice(start, GROUP) }.first_chunk_mut() {
                    matrix_unit::turn(lines, to);
                }
            }
        }
    }
}
