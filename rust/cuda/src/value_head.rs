//! Launches of the value head.
use crate::Result;
use crate::arguments::{
    DeviceDropout, DeviceHead, FORWARD_MANY_ROWS, FORWARD_ROW_BYTES, FORWARD_WARPS, MOST_BLOCKS, WARP,
};
use crate::device::{Device, Geometry, Stream};
use crate::rows::DeviceRows;

impl Device {
    /// Writes the value of each row to `values`, float32 `[N, K]` row-major; the work is sent to `stream` and not waited for.
    ///
    /// # Errors
    /// [`Error::Size`] for a head without outputs, [`Error::Launch`] and [`Error::OutOfMemory`] from the driver.
    ///
    /// # Safety
    /// Every address must be one of this device's memory, or of memory that it can reach, and hold what `hidden`, `head` and
    /// `values` say until `stream` has done the work; whatever writes there must be ordered before or after it.
    pub unsafe fn value_head(
        &self,
        stream: Stream,
        hidden: &DeviceRows,
        head: &DeviceHead,
        dropout: Option<&DeviceDropout>,
        values: u64,
    ) -> Result<()> {
        head.check()?;
        if hidden.count() == 0 {
            return Ok(());
        }
        let is_vector = hidden.are_vectors(&[head.weight]);
        let has_several = is_vector && head.outputs == 1 && hidden.count() >= FORWARD_MANY_ROWS;
        let functions = &self.functions;
        let family = if has_several { &functions.forward_rows } else { functions.forward.get(is_vector) };
        let function = family.get(hidden.dtype, dropout.is_some());
        let rows = if has_several { FORWARD_ROW_BYTES / hidden.dtype.size() as u64 } else { 1 };
        let dropout = dropout.copied().unwrap_or(DeviceDropout::NONE);
        let arguments = [
            (&hidden.argument).into(),
            (&head.weight).into(),
            (&head.bias).into(),
            (&head.outputs).into(),
            (&dropout).into(),
            (&values).into(),
        ];
        // SAFETY: these are the arguments of `vhead_value_head_*`; the caller promises what they point to.
        unsafe { self.launch(function, geometry(hidden.count(), rows), stream, arguments) }
    }
}

/// Enough warps of `rows_in_warp` rows for `rows`, as far as a grid goes: warps walk on where it does not.
fn geometry(rows: u64, rows_in_warp: u64) -> Geometry {
    let blocks = rows.div_ceil(u64::from(FORWARD_WARPS) * rows_in_warp).min(MOST_BLOCKS);
    Geometry { grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1], block: [WARP * FORWARD_WARPS, 1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_warp() {
        for (rows, in_warp, blocks) in [
            (1, 1, 1),
            (5, 1, 3),
            (8191, 1, 4096),
            (8192, 4, 1024),
            (8193, 4, 1025),
            (8193, 2, 2049),
            (1 << 60, 1, MOST_BLOCKS),
        ] {
            let found = geometry(rows, in_warp);
            assert_eq!(
                (u64::from(found.grid[0]), found.grid[1], found.block),
                (blocks, 1, [64, 1]),
                "{rows} {in_warp}"
            );
        }
    }
}
