//! A checked view of hidden states: rows of `H` contiguous elements, anywhere in a buffer.
use crate::{Error, Result};
use std::marker::PhantomData;

/// `[..., H]` hidden states whose last dimension is contiguous; the outer dimensions may have any stride.
///
/// Rows are numbered in row-major order of the outer dimensions; that number is the dropout mask's row.
#[derive(Debug, Clone)]
pub struct Rows<'a, T> {
    data: *const T,
    columns: usize,
    count: usize,
    outer: Vec<(usize, isize)>,
    owner: PhantomData<&'a [T]>,
}

// SAFETY: a `Rows` is a shared borrow of a slice of `T`; it hands out reads only.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Send for Rows<'_, T> {}

impl<'a, T: Copy> Rows<'a, T> {
    /// Contiguous `[rows, columns]`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `data` has `rows * columns` elements.
    pub fn contiguous(data: &'a [T], rows: usize, columns: usize) -> Result<Self> {
        if rows.checked_mul(columns) != Some(data.len()) {
            return Err(Error::Length { what: "hidden", expected: rows.saturating_mul(columns), actual: data.len() });
        }
        Ok(Self {
            data: data.as_ptr(),
            columns,
            count: rows,
            outer: vec![(rows, columns.cast_signed())],
            owner: PhantomData,
        })
    }

    /// A view into a slice: row 0 starts at element `offset`, `sizes` and `strides` (in elements) describe the outer
    /// dimensions.
    ///
    /// # Errors
    /// [`Error::Layout`] where there is not one stride a size, or a row would reach outside `data`.
    pub fn strided(data: &'a [T], offset: usize, sizes: &[usize], strides: &[isize], columns: usize) -> Result<Self> {
        let wrong =
            || Error::Layout { what: "hidden", sizes: sizes.to_vec(), strides: strides.to_vec(), length: data.len() };
        if sizes.len() != strides.len() || sizes.iter().try_fold(1_usize, |n, size| n.checked_mul(*size)).is_none() {
            return Err(wrong());
        }
        let (mut first, mut end) = (offset as i128, offset as i128 + columns as i128);
        for (size, stride) in sizes.iter().zip(strides) {
            let reach = (*size as i128 - 1) * *stride as i128;
            (first, end) = (first + reach.min(0), end + reach.max(0));
        }
        if !sizes.contains(&0) && (first < 0 || end > data.len() as i128) {
            return Err(wrong());
        }
        // SAFETY: the lowest and the highest element of all rows lie inside `data`, which lives for `'a`.
        Ok(unsafe { Self::from_raw(data.as_ptr().wrapping_add(offset), sizes, strides, columns) })
    }

    /// A view of memory that somebody else keeps alive.
    ///
    /// `sizes` and `strides` (in elements) describe the outer dimensions; neighbours that can be walked as one are merged.
    ///
    /// # Safety
    /// Every element that sizes, strides and `columns` reach from `data` must be readable and unchanged for `'a`.
    /// `data` need not be aligned to `T`.
    #[must_use]
    pub unsafe fn from_raw(data: *const T, sizes: &[usize], strides: &[isize], columns: usize) -> Self {
        let mut outer: Vec<(usize, isize)> = Vec::with_capacity(sizes.len());
        for (&size, &stride) in sizes.iter().zip(strides).filter(|(size, _)| **size != 1) {
            match outer.last_mut() {
                Some(last) if last.1 == stride * size.cast_signed() => *last = (last.0 * size, stride),
                _ => outer.push((size, stride)),
            }
        }
        let count = sizes.iter().product();
        Self { data, columns, count, outer, owner: PhantomData }
    }

    /// `count` rows from row `first` on.
    ///
    /// # Panics
    /// Outside the view.
    #[must_use]
    pub(crate) fn part(&self, first: usize, count: usize) -> Self {
        assert!(first <= self.count && count <= self.count - first);
        if first == 0 && count == self.count {
            return self.clone();
        }
        let [(_, stride)] = self.outer[..] else { unreachable!("callers merge their rows first") };
        let data = self.data.wrapping_offset(first.cast_signed() * stride);
        Self { data, columns: self.columns, count, outer: vec![(count, stride)], owner: PhantomData }
    }

    /// Number of rows.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements in a row: `H`.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Where row `index` starts; valid for `columns` unaligned reads while `index < count`.
    #[must_use]
    #[inline]
    pub fn row(&self, index: usize) -> *const T {
        if let [(_, stride)] = self.outer[..] {
            return self.data.wrapping_offset(index.cast_signed() * stride);
        }
        let (mut index, mut offset) = (index, 0);
        for &(size, stride) in self.outer.iter().rev() {
            offset += (index % size).cast_signed() * stride;
            index /= size;
        }
        self.data.wrapping_offset(offset)
    }

    /// One element.
    ///
    /// # Panics
    /// Outside the view.
    #[must_use]
    #[inline]
    pub fn get(&self, row: usize, column: usize) -> T {
        assert!(row < self.count && column < self.columns, "[{row}, {column}] of [{}, {}]", self.count, self.columns);
        // SAFETY: the element lies inside the view.
        unsafe { self.row(row).add(column).read_unaligned() }
    }

    /// Copies the elements of a row from column `start` on, as many as `to` holds.
    ///
    /// # Panics
    /// Where they lie outside the view.
    #[inline]
    pub(crate) fn read_part(&self, row: usize, start: usize, to: &mut [T]) {
        assert!(row < self.count && start <= self.columns && to.len() <= self.columns - start);
        // SAFETY: the elements lie inside the view; a copy of bytes needs no alignment.
        unsafe {
            let from = self.row(row).add(start).cast::<u8>();
            from.copy_to_nonoverlapping(to.as_mut_ptr().cast(), size_of_val(to));
        }
    }
}
