//! Attention over one packed row by the matrix unit, in bfloat16 with a softmax in float32.
//!
//! Keys and queries are taken 32 at a time, whatever they belong to: of such a block, a pair of query and key is computed and
//! hidden where the query does not see the key, and a block in which nothing is seen is not computed. So no key is copied for
//! each of the paths that go through it, and time grows as the visible pairs do.
//!
//! Products stand with keys in rows and queries in columns, so that a softmax adds whole vectors.
use crate::matrix_unit::{GROUP, Line, Packed, STEP, Unit, is_available, line_of, pack_sixteen, with_scratch};
use crate::simd::attention::{Correct, NOTHING, Pairs, Softmax};
use crate::threads::Shared;
use crate::{Error, Executor, Level, Result, Rows, allocation};
use half::bf16;
use std::ops::Range;

/// Groups of keys between two corrections of what is summed; their products stay in the first-level cache.
const RUN: usize = 4;

/// What the rows of a packed row see: row q sees row k where `k <= q < ends[k]`, and within a window only where
/// `positions[q] - positions[k] < window`.
#[derive(Debug)]
pub struct Visibility {
    rows: usize,
    ends: Vec<f32>,
    positions: Vec<f32>,
    /// Of each 32 rows, the least and the greatest of both.
    of_groups: Vec<Bounds>,
}

#[derive(Debug, Clone, Copy)]
struct Bounds {
    ends: (f32, f32),
    positions: (f32, f32),
}

impl Visibility {
    /// # Errors
    /// [`Error::Length`] where the two differ in length, or hold 2^24 rows or more, which float32 does not tell apart.
    #[expect(clippy::cast_precision_loss, reason = "rows below 2^24 are float32 numbers")]
    pub fn new(ends: &[i64], positions: &[i64]) -> Result<Self> {
        const MOST: usize = 1 << 24;
        let rows = ends.len();
        if positions.len() != rows {
            return Err(Error::Length { what: "positions", expected: rows, actual: positions.len() });
        }
        if rows >= MOST {
            return Err(Error::Length { what: "ends", expected: MOST - 1, actual: rows });
        }
        let padded = |numbers: &[i64]| {
            let padding = rows.next_multiple_of(GROUP) - rows;
            let numbers = numbers.iter().map(|&x| x as f32).chain(std::iter::repeat_n(0.0, padding));
            allocation::collected(rows + padding, numbers)
        };
        let (ends, positions) = (padded(ends)?, padded(positions)?);
        let bounds = |numbers: &[f32]| {
            let least = numbers.iter().fold(f32::INFINITY, |a, b| a.min(*b));
            (least, numbers.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b)))
        };
        let of_groups = ends.chunks(GROUP).zip(positions.chunks(GROUP));
        let of_groups =
            of_groups.map(|(ends, positions)| Bounds { ends: bounds(ends), positions: bounds(positions) }).collect();
        Ok(Self { rows, ends, positions, of_groups })
    }

    /// The next run of groups of keys from `from` on that some of a group of queries see, and whether those see all of it.
    fn next_run(&self, from: usize, queries: usize, window: f32) -> Option<(Range<usize>, bool)> {
        let first = (from..=queries).find(|&keys| self.sees(queries, keys, window))?;
        let mut run = first..first + 1;
        while run.len() < RUN && run.end <= queries && self.sees(queries, run.end, window) {
            run.end += 1;
        }
        let all = run.clone().all(|keys| self.sees_all(queries, keys, window));
        Some((run, all))
    }

    #[expect(clippy::cast_precision_loss, reason = "rows below 2^24 are float32 numbers")]
    fn sees(&self, queries: usize, keys: usize, window: f32) -> bool {
        let (of_queries, of_keys) = (self.of_groups[queries], self.of_groups[keys]);
        of_keys.ends.1 > (queries * GROUP) as f32 && of_queries.positions.0 - of_keys.positions.1 < window
    }

    #[expect(clippy::cast_precision_loss, reason = "rows below 2^24 are float32 numbers")]
    fn sees_all(&self, queries: usize, keys: usize, window: f32) -> bool {
        let (of_queries, of_keys) = (self.of_groups[queries], self.of_groups[keys]);
        keys < queries
            && of_keys.ends.0 >= self.rows.min((queries + 1) * GROUP) as f32
            && of_queries.positions.1 - of_keys.positions.0 < window
    }
}

/// The memory that attention needs; one layer after the other may use it.
#[derive(Debug, Default)]
pub struct Attention {
    keys: Packed,
    values: Packed,
}

/// Queries, keys and values of one layer: of each head the rows, one head after the other.
struct Layer<'a> {
    query: &'a Rows<'a, bf16>,
    heads: usize,
    /// Query heads that share a key head.
    shared: usize,
    /// Steps of a query, and groups of 32 numbers of a value.
    steps: usize,
    widths: usize,
    /// Numbers of a value.
    width: usize,
    scale: f32,
    window: f32,
}

impl Attention {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes the results of `[heads, T]` queries to `to`, `[T, heads, E]`.
    ///
    /// # Arguments
    /// `query`: `[heads * T]` rows of `D` numbers. `key`, `value`: `[key heads * T]` rows of `D` and of `E` numbers.
    /// `scale`: what products are multiplied by, above 0. `window`: rows that each row sees on its path, itself among them.
    ///
    /// # Errors
    /// [`Error::Length`] where sizes do not fit, [`Error::Level`] without the unit, [`Error::Allocation`].
    pub fn apply(
        &mut self,
        [query, key, value]: [&Rows<'_, bf16>; 3],
        visibility: &Visibility,
        (scale, window): (f32, Option<usize>),
        to: &mut [bf16],
        executor: &dyn Executor,
    ) -> Result<()> {
        let rows = visibility.rows;
        let (heads, key_heads) = (query.count() / rows.max(1), key.count() / rows.max(1));
        for (what, expected, actual) in [
            ("query", heads * rows, query.count()),
            ("key", query.columns(), key.columns()),
            ("key", key_heads * rows, key.count()),
            ("heads", heads / key_heads.max(1) * key_heads, heads),
            ("value", key.count(), value.count()),
            ("out", query.count() * value.columns(), to.len()),
        ] {
            if expected != actual {
                return Err(Error::Length { what, expected, actual });
            }
        }
        if !is_available() {
            return Err(Error::Level("amx"));
        }
        if to.is_empty() {
            return Ok(());
        }
        let width = value.columns();
        #[expect(clippy::cast_precision_loss, reason = "a window of 2^24 rows sees all there are")]
        let layer = Layer {
            query,
            heads,
            shared: heads / key_heads,
            steps: query.columns().div_ceil(STEP),
            widths: width.div_ceil(GROUP),
            width,
            scale,
            window: window.map_or(f32::INFINITY, |window| window as f32),
        };
        self.pack(key, value, key_heads, rows, executor)?;
        let (groups, to) = (rows.div_ceil(GROUP), Shared::new(to));
        executor.run(groups * key_heads, &|task| {
            // The last ones see the most, and come first.
            let queries = groups - 1 - task / key_heads;
            layer.attend(task % key_heads, queries, visibility, (&self.keys, &self.values), &to);
        });
        Ok(())
    }

    /// Packs keys as rows, and values as the rows of their transpose, 32 keys at a time.
    fn pack(
        &mut self,
        key: &Rows<'_, bf16>,
        value: &Rows<'_, bf16>,
        heads: usize,
        rows: usize,
        executor: &dyn Executor,
    ) -> Result<()> {
        let (groups, steps, widths) =
            (rows.div_ceil(GROUP), key.columns().div_ceil(STEP), value.columns().div_ceil(GROUP));
        self.keys.resize(heads * groups, key.columns())?;
        self.values.resize(heads * groups, widths * GROUP)?;
        let (keys, values) = (self.keys.shared(), self.values.shared());
        executor.run(heads * groups, &|task| {
            let (head, group) = (task / groups, task % groups);
            let (first, count) = (head * rows + group * GROUP, GROUP.min(rows - group * GROUP));
            // SAFETY: this group's lines are nobody else's.
            let lines = unsafe { keys.slice(task * steps * GROUP, steps * GROUP) };
            for (at, line) in lines.iter_mut().enumerate() {
                let row = at % GROUP;
                *line = if row < count { line_of(key, first + row, at / GROUP) } else { Line([bf16::ZERO; STEP]) };
            }
            for width in 0..widths {
                // SAFETY: as above.
                let lines = unsafe { values.slice(((head * widths + width) * groups + group) * GROUP, GROUP) };
                pack_transposed(value, first..first + count, width, lines);
            }
        });
        Ok(())
    }
}

/// 32 numbers of up to 32 rows, a line for each number, with zeros for rows that are not there.
fn pack_transposed(rows: &Rows<'_, bf16>, range: Range<usize>, step: usize, to: &mut [Line]) {
    to.fill(Line([bf16::ZERO; STEP]));
    for (at, row) in range.enumerate() {
        let numbers = line_of(rows, row, step);
        for (line, number) in to.iter_mut().zip(numbers.0) {
            line.0[at] = number;
        }
    }
}

impl Layer<'_> {
    /// The results of 32 rows of queries in all heads that share one of the keys'.
    fn attend(
        &self,
        key_head: usize,
        queries: usize,
        visibility: &Visibility,
        (keys, values): (&Packed, &Packed),
        to: &Shared<'_, bf16>,
    ) {
        const BLOCK: usize = GROUP * GROUP;
        let (rows, unit) = (visibility.rows, Unit::new());
        let count = GROUP.min(rows - queries * GROUP);
        let packed = self.packed_queries(key_head, queries, rows);
        let mut weights = [Line([bf16::ZERO; STEP]); RUN * GROUP];
        let mut states = vec![State::new(); self.shared];
        with_scratch((RUN + self.shared * self.widths) * BLOCK, |scratch| {
            let (products, results) = scratch.split_at_mut(RUN * BLOCK);
            let (mut from, mut is_first, groups) = (0, true, rows.div_ceil(GROUP));
            while let Some((run, all)) = visibility.next_run(from, queries, self.window) {
                for head in 0..self.shared {
                    let query = &packed[head * self.steps * GROUP..][..self.steps * GROUP];
                    for (keys_at, products) in run.clone().zip(products.chunks_mut(BLOCK)) {
                        let at = (key_head * groups + keys_at) * self.steps * GROUP;
                        unit.multiply_steps(&keys.lines()[at..][..self.steps * GROUP], query, products, false);
                    }
                    let products = &mut products.as_chunks_mut::<GROUP>().0[..run.len() * GROUP];
                    let to = &mut weights[..run.len() * GROUP];
                    let pairs = (!all).then(|| self.pairs(&run, queries, visibility));
                    states[head].weigh(products, pairs, self.scale, to);
                    let results = &mut results[head * self.widths * BLOCK..][..self.widths * BLOCK];
                    if !is_first {
                        let factors = &states[head].correction;
                        Level::Avx512.run(Correct { factors, numbers: results.as_chunks_mut().0 });
                    }
                    for (width, results) in results.chunks_mut(BLOCK).enumerate() {
                        let at = ((key_head * self.widths + width) * groups + run.start) * GROUP;
                        unit.multiply_steps(&values.lines()[at..][..to.len()], to, results, !is_first);
                    }
                }
                (from, is_first) = (run.end, false);
            }
            for (head, state) in states.iter().enumerate() {
                let results = &results[head * self.widths * BLOCK..][..self.widths * BLOCK];
                self.write(key_head * self.shared + head, queries * GROUP..queries * GROUP + count, results, state, to);
            }
        });
    }

    /// The queries of each head as columns.
    fn packed_queries(&self, key_head: usize, queries: usize, rows: usize) -> Vec<Line> {
        let mut packed = vec![Line([bf16::ZERO; STEP]); self.shared * self.steps * GROUP];
        for (at, lines) in packed.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (head, step) = (at / (2 * self.steps), at / 2 % self.steps);
            let start = (key_head * self.shared + head) * rows;
            let first = queries * GROUP + at % 2 * 16;
            let end = start + rows.min((queries + 1) * GROUP);
            pack_sixteen(self.query, (start + first).min(end)..end, step, lines);
        }
        packed
    }

    fn pairs<'a>(&self, run: &Range<usize>, queries: usize, visibility: &'a Visibility) -> Pairs<'a> {
        let keys = run.start * GROUP..run.end * GROUP;
        Pairs {
            rows: (keys.start, queries * GROUP),
            ends: &visibility.ends[keys.clone()],
            positions: (&visibility.positions[keys], &visibility.positions[queries * GROUP..][..GROUP]),
            window: self.window,
        }
    }

    /// Writes a head's results, `[widths * 32, 32]`, to its rows.
    fn write(&self, head: usize, rows: Range<usize>, results: &[f32], state: &State, to: &Shared<'_, bf16>) {
        for (at, row) in rows.enumerate() {
            // SAFETY: this head of this row is nobody else's.
            let to = unsafe { to.slice((row * self.heads + head) * self.width, self.width) };
            let factor = 1.0 / state.sums[at];
            for (number, results) in to.iter_mut().zip(results.as_chunks::<GROUP>().0) {
                *number = bf16::from_f32(results[at] * factor);
            }
        }
    }
}

/// Of 32 queries in one head over the keys so far.
#[derive(Debug, Clone)]
struct State {
    largest: [f32; GROUP],
    sums: [f32; GROUP],
    correction: [f32; GROUP],
}

impl State {
    fn new() -> Self {
        Self { largest: [NOTHING; GROUP], sums: [0.0; GROUP], correction: [0.0; GROUP] }
    }

    fn weigh(&mut self, products: &mut [[f32; GROUP]], pairs: Option<Pairs<'_>>, scale: f32, to: &mut [Line]) {
        let Self { largest, sums, correction } = self;
        Level::Avx512.run(Softmax { products, pairs, scale, largest, sums, correction, to });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pool, Serial};

    /// A tree: a beginning, two branches after it, one of which forks, and another sequence. `[row, end]`.
    fn tree(lengths: [usize; 6]) -> (Vec<i64>, Vec<i64>) {
        let starts: Vec<usize> = lengths.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
        let total = starts[5] + lengths[5];
        // The beginning goes on to the end of the fifth part, the second part to the end of the fourth.
        let ends = [starts[5], starts[4], starts[3], starts[4], starts[5], total];
        let before = [0, lengths[0], lengths[0] + lengths[1], lengths[0] + lengths[1], lengths[0], 0];
        let parts = || (0..6).flat_map(|part| (0..lengths[part]).map(move |i| (part, i)));
        let end = parts().map(|(part, _)| ends[part] as i64).collect();
        (end, parts().map(|(part, i)| (before[part] + i) as i64).collect())
    }

    fn noise(count: usize, seed: f32) -> Vec<bf16> {
        (0..count).map(|i| bf16::from_f32((i as f32 * 12.9898 + seed).sin() * 2.0)).collect()
    }

    struct Case {
        tree: (Vec<i64>, Vec<i64>),
        heads: (usize, usize),
        sizes: (usize, usize),
        window: Option<usize>,
        states: [Vec<bf16>; 3],
    }

    impl Case {
        fn new(lengths: [usize; 6], heads: (usize, usize), sizes: (usize, usize), window: Option<usize>) -> Self {
            #[expect(clippy::disallowed_methods, reason = "integers")]
            let (tree, rows) = (tree(lengths), lengths.iter().sum::<usize>());
            let counts = [heads.0 * sizes.0, heads.1 * sizes.0, heads.1 * sizes.1];
            let mut seed = 0.0;
            let states = counts.map(|count| {
                seed += 1.7;
                noise(rows * count, seed)
            });
            Self { tree, heads, sizes, window, states }
        }

        fn rows(&self) -> usize {
            self.tree.0.len()
        }

        fn found(&self, executor: &dyn Executor) -> Result<Vec<bf16>> {
            let ([q, k, v], rows) = (&self.states, self.rows());
            let query = Rows::contiguous(q, self.heads.0 * rows, self.sizes.0)?;
            let key = Rows::contiguous(k, self.heads.1 * rows, self.sizes.0)?;
            let value = Rows::contiguous(v, self.heads.1 * rows, self.sizes.1)?;
            let mut to = vec![bf16::ZERO; self.heads.0 * rows * self.sizes.1];
            let visibility = Visibility::new(&self.tree.0, &self.tree.1)?;
            Attention::new().apply([&query, &key, &value], &visibility, (0.3, self.window), &mut to, executor)?;
            Ok(to)
        }

        /// One result in float64.
        fn exact(&self, row: usize, head: usize, number: usize, window: Option<usize>) -> f64 {
            let (rows, (width, value_width)) = (self.rows(), self.sizes);
            let key_head = head / (self.heads.0 / self.heads.1);
            let (mut sum, mut total) = (0.0, 0.0);
            for key in 0..=row {
                let near = window.is_none_or(|window| self.tree.1[row] - self.tree.1[key] < window as i64);
                if (row as i64) < self.tree.0[key] && near {
                    let q = &self.states[0][(head * rows + row) * width..][..width];
                    let k = &self.states[1][(key_head * rows + key) * width..][..width];
                    let product = q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).fold(0.0, |a, b| a + b);
                    let weight = (product * 0.3).exp();
                    sum += weight * self.states[2][(key_head * rows + key) * value_width + number].to_f64();
                    total += weight;
                }
            }
            sum / total
        }

        fn worst(&self, found: &[bf16], window: Option<usize>) -> f64 {
            let (heads, width) = (self.heads.0, self.sizes.1);
            let error = |(at, found): (usize, &bf16)| {
                let (row, head, number) = (at / width / heads, at / width % heads, at % width);
                (found.to_f64() - self.exact(row, head, number, window)).abs()
            };
            found.iter().enumerate().step_by(7).map(error).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
        }
    }

    const WITHIN: f64 = 0.02;

    #[test]
    fn results_are_those_of_float64() -> Result<()> {
        if !is_available() {
            return Ok(());
        }
        for (lengths, heads, sizes, window) in [
            ([40, 33, 20, 31, 70, 45], (4, 2), (64, 64), None),
            ([130, 1, 1, 200, 3, 2], (7, 1), (80, 80), None),
            ([3, 2, 1, 2, 4, 5], (2, 2), (33, 20), None),
            ([90, 40, 30, 50, 64, 32], (2, 1), (32, 96), Some(37)),
            ([300, 33, 20, 31, 70, 45], (2, 2), (16, 16), Some(1)),
        ] {
            let case = Case::new(lengths, heads, sizes, window);
            let found = case.found(&Pool::new(2))?;
            let worst = case.worst(&found, window);
            assert!(worst < WITHIN, "{worst} with {lengths:?}");
            assert!(case.found(&Serial)? == found);
        }
        Ok(())
    }

    #[test]
    fn another_window_would_be_noticed() -> Result<()> {
        if is_available() {
            let case = Case::new([90, 40, 30, 50, 64, 32], (2, 1), (32, 96), Some(37));
            assert!(case.worst(&case.found(&Serial)?, Some(36)) > WITHIN);
        }
        Ok(())
    }

    #[test]
    fn rows_that_are_not_seen_change_nothing() -> Result<()> {
        if !is_available() {
            return Ok(());
        }
        let mut case = Case::new([40, 33, 20, 31, 70, 45], (4, 2), (64, 64), None);
        let before = case.found(&Serial)?;
        // The third part is seen by itself alone.
        for states in &mut case.states {
            for head in 0..states.len() / 64 / 239 {
                states[(head * 239 + 73) * 64..(head * 239 + 93) * 64].fill(bf16::from_f32(9.0));
            }
        }
        let after = case.found(&Serial)?;
        let row = 4 * 64;
        assert!(before[..73 * row] == after[..73 * row] && before[93 * row..] == after[93 * row..]);
        assert!(before[73 * row..93 * row] != after[73 * row..93 * row]);
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() -> Result<()> {
        let case = Case::new([3, 2, 1, 2, 4, 5], (3, 2), (32, 32), None);
        assert!(case.found(&Serial).is_err());
        assert!(Visibility::new(&[1, 2], &[0]).is_err());
        Ok(())
    }
}
