//! Products of bfloat16 matrices by the processor's matrix unit (Intel AMX), added in float32.
//!
//! Both operands are packed: 32 rows, or 32 columns of the result, side by side, 32 numbers of each at a time. A product of
//! a row and a column is summed in steps of 32 in rising order, whatever else is multiplied and on however many threads, so
//! that a row's products depend on that row and the columns alone.
#[cfg(target_arch = "x86_64")]
use crate::simd::amx;
use crate::threads::Shared;
use crate::{Executor, Result, Rows, allocation};
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

/// Rows, or columns, that are packed together.
pub(crate) const GROUP: usize = 32;
/// Numbers of a row that are multiplied in one step.
pub(crate) const STEP: usize = 32;
/// Groups of rows that a task multiplies with each group of columns.
pub(crate) const TASK_GROUPS: usize = 4;
/// Steps whose numbers of a group stay in the first-level cache.
const CACHED_STEPS: usize = 16;

/// Whether this processor has the unit, and the system lets this process use it.
#[must_use]
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::is_available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// 32 numbers: a row's, or 16 pairs of as many columns.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [bf16; STEP]);

/// Packed rows or columns; its memory is used again for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    lines: Vec<Line>,
    steps: usize,
}

impl Packed {
    /// Makes room for `groups` of rows or columns of `length` numbers, whose contents are unspecified.
    pub(crate) fn resize(&mut self, groups: usize, length: usize) -> Result<()> {
        self.steps = length.div_ceil(STEP);
        let needed = groups * self.steps * GROUP;
        if self.lines.len() < needed {
            self.lines = Vec::new();
            self.lines = allocation::filled(Line([bf16::ZERO; STEP]), needed)?;
        }
        Ok(())
    }

    /// Lines of a group.
    pub(crate) fn group_lines(&self) -> usize {
        self.steps * GROUP
    }

    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub(crate) fn shared(&mut self) -> Shared<'_, Line> {
        Shared::new(&mut self.lines)
    }

    /// Packs rows as they are.
    pub(crate) fn pack_rows(&mut self, rows: &Rows<'_, bf16>, executor: &dyn Executor) -> Result<()> {
        self.resize(rows.count().div_ceil(GROUP), rows.columns())?;
        let (steps, to) = (self.steps, self.shared());
        executor.run(rows.count().div_ceil(GROUP), &|group| {
            // SAFETY: this group's lines are nobody else's.
            let lines = unsafe { to.slice(group * steps * GROUP, steps * GROUP) };
            for (at, line) in lines.iter_mut().enumerate() {
                *line = line_of(rows, group * GROUP + at % GROUP, at / GROUP);
            }
        });
        Ok(())
    }

    /// Packs the rows of a weight as columns.
    ///
    /// # Panics
    /// Where the unit is not available, or the weight has fewer rows.
    pub(crate) fn pack_columns(
        &mut self,
        weight: &Rows<'_, bf16>,
        range: Range<usize>,
        executor: &dyn Executor,
    ) -> Result<()> {
        assert!(is_available() && range.end <= weight.count());
        let groups = range.len().div_ceil(GROUP);
        self.resize(groups, weight.columns())?;
        let (steps, to) = (self.steps, self.shared());
        executor.run(groups, &|group| {
            // SAFETY: this group's lines are nobody else's.
            let lines = unsafe { to.slice(group * steps * GROUP, steps * GROUP) };
            for (at, lines) in lines.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let first = range.start + group * GROUP + at % 2 * 16;
                pack_sixteen(weight, first..range.end, at / 2, lines);
            }
        });
        Ok(())
    }

    /// Packs the numbers of some rows as columns: number `h` of every row is column `h`.
    ///
    /// # Panics
    /// Where the unit is not available, or there are fewer rows.
    pub(crate) fn pack_numbers(
        &mut self,
        rows: &Rows<'_, bf16>,
        range: Range<usize>,
        executor: &dyn Executor,
    ) -> Result<()> {
        assert!(is_available() && range.end <= rows.count());
        let groups = rows.columns().div_ceil(GROUP);
        self.resize(groups, range.len())?;
        let (steps, to) = (self.steps, self.shared());
        let rows = rows.part(range.start, range.len());
        executor.run(groups, &|group| {
            // SAFETY: this group's lines are nobody else's.
            let lines = unsafe { to.slice(group * steps * GROUP, steps * GROUP) };
            for (step, lines) in lines.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                pack_pairs(std::array::from_fn(|at| line_of(&rows, step * STEP + at, group)), lines);
            }
        });
        Ok(())
    }
}

/// Rows `32 * step` on, numbers of one group, as pairs of rows: the first 16 lines are the first 16 columns'.
fn pack_pairs(rows: [Line; GROUP], to: &mut [Line; GROUP]) {
    for (pair, [first, second]) in rows.as_chunks::<2>().0.iter().enumerate() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the unit comes with AVX-512 BW.
        unsafe {
            (to[pair].0, to[16 + pair].0) = amx::interleave(&first.0, &second.0);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (pair, first, second, &to);
    }
}

/// 32 lines with line and number exchanged.
///
/// # Panics
/// Where the unit is not available.
pub(crate) fn turn(lines: &[Line; GROUP], to: &mut [Line; GROUP]) {
    assert!(is_available());
    let mut pairs = [Line([bf16::ZERO; STEP]); GROUP];
    pack_pairs(*lines, &mut pairs);
    for (pairs, to) in pairs.as_chunks::<16>().0.iter().zip(to.as_chunks_mut::<16>().0) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the unit comes with AVX-512; each line is 64 bytes.
        unsafe {
            amx::transpose(pairs.each_ref().map(|line| line.0.as_ptr().cast()), to.as_mut_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (pairs, to);
    }
}

/// Numbers `32 * step` on of a row, zeros behind its end and in rows that are not there.
pub(crate) fn line_of(rows: &Rows<'_, bf16>, row: usize, step: usize) -> Line {
    if row < rows.count() && (step + 1) * STEP <= rows.columns() {
        // SAFETY: the row has these numbers; they may lie anywhere.
        return Line(unsafe { rows.row(row).add(step * STEP).cast::<[bf16; STEP]>().read_unaligned() });
    }
    let mut line = Line([bf16::ZERO; STEP]);
    if row < rows.count() {
        let count = STEP.min(rows.columns() - step * STEP);
        rows.read_part(row, step * STEP, &mut line.0[..count]);
    }
    line
}

/// Sixteen columns' numbers of one step, in pairs: the first ones of `columns`, zeros where there are fewer.
pub(crate) fn pack_sixteen(weight: &Rows<'_, bf16>, columns: Range<usize>, step: usize, to: &mut [Line; 16]) {
    let mut lines = [Line([bf16::ZERO; STEP]); 16];
    let mut from = lines.each_ref().map(|line| line.0.as_ptr());
    if columns.len() >= 16 && (step + 1) * STEP <= weight.columns() {
        for (from, column) in from.iter_mut().zip(columns) {
            *from = weight.row(column).wrapping_add(step * STEP);
        }
    } else {
        for (line, column) in lines.iter_mut().zip(columns) {
            *line = line_of(weight, column, step);
        }
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the unit comes with AVX-512; the pointers lead to 32 numbers each, and `to` has room for as many.
    unsafe {
        amx::transpose(from.map(<*const bf16>::cast), to.as_mut_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, to);
}

/// The unit's registers in one thread.
pub(crate) struct Unit {
    #[cfg(target_arch = "x86_64")]
    tiles: amx::Tiles,
}

impl Unit {
    /// # Panics
    /// Where the unit is not available.
    pub(crate) fn new() -> Self {
        assert!(is_available());
        Self {
            #[cfg(target_arch = "x86_64")]
            tiles: amx::Tiles::new(),
        }
    }

    /// Writes the products of `groups` of rows with group `column` of columns to `to`: 32 numbers in each of as many rows,
    /// `stride` numbers apart.
    ///
    /// # Panics
    /// Where rows and columns differ in length, or something is outside what is packed or `to`.
    pub(crate) fn multiply(&self, rows: (&[Line], Range<usize>), columns: (&Packed, usize), to: (&mut [f32], usize)) {
        self.multiply_onto(rows, columns, to, false);
    }

    /// [`Unit::multiply`]; with `add`, the products are added to what is there.
    ///
    /// # Panics
    /// As [`Unit::multiply`].
    pub(crate) fn multiply_onto(
        &self,
        (rows, groups): (&[Line], Range<usize>),
        (columns, column): (&Packed, usize),
        (to, stride): (&mut [f32], usize),
        add: bool,
    ) {
        let (steps, each) = (columns.steps, columns.group_lines());
        let columns = &columns.lines[column * each..][..each];
        let rows = &rows[groups.start * each..groups.end * each];
        assert!(stride >= GROUP && to.len() + stride - GROUP >= groups.len() * GROUP * stride);
        for first in (0..steps.max(1)).step_by(CACHED_STEPS) {
            let count = CACHED_STEPS.min(steps - first);
            for group in 0..groups.len() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a step of a group is 32 lines of 64 bytes; the slices hold them, and `to` the products.
                unsafe {
                    let start = first * amx::STEP_BYTES;
                    self.tiles.multiply(
                        rows.as_ptr().cast::<u8>().add(group * steps * amx::STEP_BYTES + start),
                        columns.as_ptr().cast::<u8>().add(start),
                        count,
                        to.as_mut_ptr().add(group * GROUP * stride),
                        stride,
                        add || first > 0,
                    );
                }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = (&rows, columns, group, count, &to);
            }
        }
    }
}

impl Unit {
    /// Writes the products of a group of rows with a group of columns over some of their steps to `to`, 32 rows of 32 numbers;
    /// with `add`, added to what is there.
    ///
    /// # Panics
    /// Where rows and columns differ in length, or `to` is another size.
    pub(crate) fn multiply_steps(&self, rows: &[Line], columns: &[Line], to: &mut [f32], add: bool) {
        assert!(rows.len() == columns.len() && rows.len().is_multiple_of(GROUP) && to.len() == GROUP * GROUP);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a step of a group is 32 lines of 64 bytes; the slices hold as many of them, and `to` the products.
        unsafe {
            let (steps, to) = (rows.len() / GROUP, to.as_mut_ptr());
            self.tiles.multiply(rows.as_ptr().cast(), columns.as_ptr().cast(), steps, to, GROUP, add);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, columns, to, add);
    }
}

/// Lends a task `length` float32 numbers that its thread keeps for the next one; their contents are unspecified.
pub(crate) fn with_scratch<T>(length: usize, task: impl FnOnce(&mut [f32]) -> T) -> T {
    #[derive(Clone, Copy)]
    #[repr(C, align(64))]
    struct Scratch([f32; 16]);
    thread_local! {
        static SCRATCH: RefCell<Vec<Scratch>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|kept| {
        let lines = length.div_ceil(16);
        if kept.len() < lines {
            kept.resize(lines, Scratch([0.0; 16]));
        }
        // SAFETY: a `Scratch` is 16 numbers without padding.
        task(unsafe { std::slice::from_raw_parts_mut(kept.as_mut_ptr().cast(), length) })
    })
}
