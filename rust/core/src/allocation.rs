//! Memory whose size the caller decides: where it is not there, that is an error and not the end of the process.
use crate::{Element, Error, Result};
use std::alloc::{Layout, alloc_zeroed};

/// Room for `count` items.
///
/// # Errors
/// [`Error::Allocation`].
pub fn reserved<T>(count: usize) -> Result<Vec<T>> {
    let mut items = Vec::new();
    items.try_reserve_exact(count).map_err(|_| refused::<T>(count))?;
    Ok(items)
}

/// `count` times the same.
///
/// # Errors
/// [`Error::Allocation`].
pub fn filled<T: Clone>(item: T, count: usize) -> Result<Vec<T>> {
    let mut items = reserved(count)?;
    items.resize(count, item);
    Ok(items)
}

/// `count` items, one after the other.
///
/// # Errors
/// [`Error::Allocation`].
pub fn collected<T>(count: usize, items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut collected = reserved(count)?;
    collected.extend(items.take(count));
    Ok(collected)
}

/// `count` zeros, from memory that the allocator has already cleared where it can.
///
/// # Errors
/// [`Error::Allocation`].
pub fn zeros<T: Element>(count: usize) -> Result<Vec<T>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let layout = Layout::array::<T>(count).map_err(|_| refused::<T>(count))?;
    // SAFETY: `count` elements are more than no bytes.
    let start = unsafe { alloc_zeroed(layout) };
    if start.is_null() {
        return Err(refused::<T>(count));
    }
    // SAFETY: the global allocator has given room for `count` elements, and an element whose bits are all zero is zero.
    Ok(unsafe { Vec::from_raw_parts(start.cast(), count, count) })
}

fn refused<T>(count: usize) -> Error {
    Error::Allocation { bytes: count.saturating_mul(size_of::<T>()) }
}
