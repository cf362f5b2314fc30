//! Scratch memory that starts on a cache line: a vector load that straddles two lines costs as much as two.
use crate::{Result, allocation};

/// Float32 numbers of one cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Zeros to begin with, a whole number of cache lines.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// At least `length` numbers.
    ///
    /// # Errors
    /// [`Error::Allocation`](crate::Error::Allocation).
    pub(crate) fn new(length: usize) -> Result<Self> {
        allocation::filled(Line([0.0; 16]), length.div_ceil(16)).map(Self)
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: a `Line` is 16 numbers without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: a `Line` is 16 numbers without padding.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}
