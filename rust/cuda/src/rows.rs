//! A description of hidden states in device memory: rows of `H` contiguous elements, anywhere.
use crate::arguments::{MOST_DIMENSIONS, OCTET};
use crate::{Error, Result};
use vhead_core::Dtype;

/// Bytes that one load of the vector kernels takes, and that its addresses are multiples of.
const VECTOR: u64 = 16;

/// `[..., H]` hidden states whose last dimension is contiguous; rows are numbered in row-major order of the outer ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRows {
    pub(crate) dtype: Dtype,
    pub(crate) argument: Rows,
}

/// The kernels' own struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) data: u64,
    pub(crate) count: u64,
    pub(crate) columns: u32,
    dimensions: u32,
    sizes: [u64; MOST_DIMENSIONS],
    strides: [i64; MOST_DIMENSIONS],
}

impl DeviceRows {
    /// Rows of `columns` elements from address `data` on; `sizes` and `strides` (in elements) describe the outer dimensions,
    /// of which neighbours that can be walked as one are merged.
    ///
    /// # Errors
    /// [`Error::Size`] where more than four dimensions are left, or where the kernels could not count the elements.
    pub fn new(data: u64, dtype: Dtype, sizes: &[u64], strides: &[i64], columns: u64) -> Result<Self> {
        let count = sizes.iter().try_fold(1_u64, |count, &size| count.checked_mul(size));
        let count = count.ok_or(Error::Size { what: "rows", expected: "fewer than 2^64", actual: u64::MAX })?;
        let columns = match u32::try_from(columns) {
            Ok(columns) if columns > 0 && columns <= i32::MAX.cast_unsigned() => columns,
            _ => return Err(Error::Size { what: "columns", expected: "1 to 2^31 - 1", actual: columns }),
        };
        let outer = merged(sizes, strides);
        if outer.len() > MOST_DIMENSIONS {
            let actual = outer.len() as u64;
            return Err(Error::Size { what: "dimensions that cannot be merged", expected: "at most 4", actual });
        }
        let mut argument = Rows { data, count, columns, dimensions: 0, sizes: [1; 4], strides: [0; 4] };
        for (index, (size, stride)) in outer.into_iter().enumerate() {
            (argument.sizes[index], argument.strides[index]) = (size, stride);
            argument.dimensions += 1;
        }
        Ok(Self { dtype, argument })
    }

    /// Number of rows: `N`.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.argument.count
    }

    /// Elements in a row: `H`.
    #[must_use]
    pub fn columns(&self) -> u32 {
        self.argument.columns
    }

    /// Whether the vector kernels can read these rows, and whatever else lies at `others`, 16 bytes at a time.
    pub(crate) fn are_vectors(&self, others: &[u64]) -> bool {
        let Rows { data, columns, dimensions, strides, .. } = &self.argument;
        let aligned =
            |stride: &i64| stride.unsigned_abs().wrapping_mul(self.dtype.size() as u64).is_multiple_of(VECTOR);
        columns.is_multiple_of(OCTET)
            && strides.iter().take(*dimensions as usize).all(aligned)
            && others.iter().chain([data]).all(|address| address.is_multiple_of(VECTOR))
    }
}

fn merged(sizes: &[u64], strides: &[i64]) -> Vec<(u64, i64)> {
    let mut outer: Vec<(u64, i64)> = Vec::with_capacity(sizes.len());
    for (&size, &stride) in sizes.iter().zip(strides).filter(|(size, _)| **size != 1) {
        match outer.last_mut() {
            Some(last) if last.1 == stride.wrapping_mul(size.cast_signed()) => *last = (last.0 * size, stride),
            _ => outer.push((size, stride)),
        }
    }
    outer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(sizes: &[u64], strides: &[i64]) -> Result<DeviceRows> {
        DeviceRows::new(0x1000, Dtype::BFloat16, sizes, strides, 64)
    }

    #[test]
    fn neighbours_are_merged() {
        let found = rows(&[2, 1, 3, 5], &[15 * 64, 7, 5 * 64, 64]).unwrap();
        assert_eq!((found.argument.dimensions, found.argument.sizes[0], found.argument.strides[0]), (1, 30, 64));
        assert_eq!((found.count(), found.columns()), (30, 64));
    }

    #[test]
    fn what_cannot_be_merged_stays() {
        let found = rows(&[2, 3, 5], &[64, 1000, 128]).unwrap();
        assert_eq!(found.argument.dimensions, 3);
        assert_eq!(found.argument.strides, [64, 1000, 128, 0]);
    }

    #[test]
    fn no_outer_dimension_is_one_row() {
        assert_eq!(rows(&[], &[]).unwrap().count(), 1);
        assert_eq!(rows(&[0, 3], &[192, 64]).unwrap().count(), 0);
    }

    #[test]
    fn five_dimensions_are_too_many() {
        let error = rows(&[2, 3, 2, 3, 2], &[64, 1000, 90, 5000, 70]).unwrap_err();
        assert_eq!(error.to_string(), "dimensions that cannot be merged: expected at most 4, got 5");
    }

    #[test]
    fn columns_must_be_countable() {
        assert!(DeviceRows::new(0, Dtype::Float32, &[1], &[1], 0).is_err());
        assert!(DeviceRows::new(0, Dtype::Float32, &[1], &[1], 1 << 31).is_err());
    }

    #[test]
    fn vectors_need_alignment_of_everything() {
        let vectors = |data, stride, columns, dtype, others: &[u64]| {
            DeviceRows::new(data, dtype, &[3, 2], &[1 << 20, stride], columns).unwrap().are_vectors(others)
        };
        assert!(vectors(0x1000, 72, 64, Dtype::BFloat16, &[0, 16]));
        assert!(vectors(0x1000, 68, 64, Dtype::Float32, &[]));
        assert!(!vectors(0x1000, 68, 64, Dtype::BFloat16, &[]));
        assert!(!vectors(0x1008, 72, 64, Dtype::BFloat16, &[]));
        assert!(!vectors(0x1000, 72, 60, Dtype::BFloat16, &[]));
        assert!(!vectors(0x1000, 72, 64, Dtype::BFloat16, &[16, 4]));
    }
}
