//! Launches of the value head's gradients.
use crate::arguments::{
    ADD_CHUNKS_COLUMNS, BACKWARD_THREADS, CHUNK, DeviceDropout, DeviceHead, LANES, MOST_BLOCKS, OCTET, SLOTS,
};
use crate::device::{Device, Geometry, Stream};
use crate::rows::DeviceRows;
use crate::{Error, Result};

/// Where gradients go, as addresses; `None` is not computed. Everything is overwritten.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceGradients {
    /// `[N, H]` in the dtype of the hidden states, contiguous.
    pub hidden: Option<u64>,
    /// The weight's.
    pub weight: Option<WeightGradient>,
    /// float32 `[K]`.
    pub bias: Option<u64>,
}

/// Where the gradient of a weight goes.
#[derive(Debug, Clone, Copy)]
pub struct WeightGradient {
    /// float32 `[K, H]`, contiguous.
    pub address: u64,
    /// Scratch: [`partials`] float32 numbers.
    pub partials: u64,
}

/// Scratch that the gradient of a weight needs: float32 numbers, one `[K, H]` for each chunk of 128 rows.
#[must_use]
pub fn partials(rows: &DeviceRows, outputs: u32) -> u64 {
    chunks(rows).saturating_mul(u64::from(rows.columns()) * u64::from(outputs))
}

fn chunks(rows: &DeviceRows) -> u64 {
    rows.count().div_ceil(CHUNK)
}

impl Device {
    /// Writes the gradients of `values`; `grad_values` is float32 `[N, K]` row-major. The work is sent to `stream` and not
    /// waited for.
    ///
    /// # Errors
    /// [`Error::Size`] for sizes that the kernels cannot count, [`Error::Launch`] and [`Error::OutOfMemory`] from the driver.
    ///
    /// # Safety
    /// As [`Device::value_head`], of `grad_values` and the gradients as well.
    pub unsafe fn value_head_backward(
        &self,
        stream: Stream,
        hidden: &DeviceRows,
        head: &DeviceHead,
        dropout: Option<&DeviceDropout>,
        grad_values: u64,
        gradients: &DeviceGradients,
    ) -> Result<()> {
        head.check()?;
        let length = length(hidden, head)?;
        if hidden.count() == 0 {
            // SAFETY: the caller promises that the gradients are there.
            return unsafe { self.clear_gradients(stream, length, head.outputs, gradients) };
        }
        // SAFETY: the caller promises what the addresses point to; the sizes have been checked.
        unsafe {
            self.launch_chunks(stream, hidden, head, dropout, grad_values, gradients)?;
            if let Some(weight) = gradients.weight {
                let chunks = chunks(hidden);
                let arguments =
                    [(&weight.partials).into(), (&chunks).into(), (&length).into(), (&weight.address).into()];
                self.launch(&self.functions.add_chunks, add_chunks_geometry(length), stream, arguments)?;
            }
            if let Some(bias) = gradients.bias {
                let geometry = Geometry { grid: [head.outputs, 1], block: [LANES, 1] };
                let rows = hidden.count();
                let arguments = [(&grad_values).into(), (&rows).into(), (&head.outputs).into(), (&bias).into()];
                self.launch(&self.functions.add_rows, geometry, stream, arguments)?;
            }
        }
        Ok(())
    }

    /// The gradient of the hidden states, and the weight's chunk by chunk.
    unsafe fn launch_chunks(
        &self,
        stream: Stream,
        hidden: &DeviceRows,
        head: &DeviceHead,
        dropout: Option<&DeviceDropout>,
        grad_values: u64,
        gradients: &DeviceGradients,
    ) -> Result<()> {
        let functions = match (gradients.hidden, gradients.weight) {
            (None, None) => return Ok(()),
            (None, Some(_)) => &self.functions.backward_weight,
            (Some(_), _) => &self.functions.backward,
        };
        let grad_hidden = gradients.hidden.unwrap_or(0);
        let partials = gradients.weight.map_or(0, |weight| weight.partials);
        let is_vector = hidden.are_vectors(&[head.weight, grad_hidden, partials]);
        let function = functions.get(is_vector).get(hidden.dtype, dropout.is_some());
        let dropout = dropout.copied().unwrap_or(DeviceDropout::NONE);
        let arguments = [
            (&hidden.argument).into(),
            (&head.weight).into(),
            (&head.outputs).into(),
            (&dropout).into(),
            (&grad_values).into(),
            (&grad_hidden).into(),
            (&partials).into(),
        ];
        // SAFETY: these are the arguments of `vhead_value_head_backward_*`; the caller promises what they point to.
        unsafe { self.launch(function, geometry(hidden)?, stream, arguments) }
    }

    /// Without rows the gradients of the parameters are zero, and those of the hidden states empty.
    unsafe fn clear_gradients(
        &self,
        stream: Stream,
        length: u32,
        outputs: u32,
        gradients: &DeviceGradients,
    ) -> Result<()> {
        let weight = gradients.weight.map(|weight| (weight.address, length));
        for (address, count) in [weight, gradients.bias.map(|bias| (bias, outputs))].into_iter().flatten() {
            // SAFETY: the caller promises so many float32 numbers there.
            unsafe { self.clear(address, u64::from(count) * 4, stream)? };
        }
        Ok(())
    }
}

/// `K * H`.
fn length(hidden: &DeviceRows, head: &DeviceHead) -> Result<u32> {
    let length = u64::from(head.outputs) * u64::from(hidden.columns());
    let wrong = |_| Error::Size { what: "weights", expected: "fewer than 2^32", actual: length };
    u32::try_from(length).map_err(wrong)
}

fn geometry(hidden: &DeviceRows) -> Result<Geometry> {
    let chunks = chunks(hidden);
    if chunks > MOST_BLOCKS {
        return Err(Error::Size { what: "rows", expected: "fewer than 2^38", actual: hidden.count() });
    }
    let columns = hidden.columns().div_ceil(OCTET * BACKWARD_THREADS);
    Ok(Geometry { grid: [u32::try_from(chunks).unwrap_or(u32::MAX), columns], block: [BACKWARD_THREADS, 1] })
}

fn add_chunks_geometry(length: u32) -> Geometry {
    Geometry { grid: [length.div_ceil(ADD_CHUNKS_COLUMNS), 1], block: [ADD_CHUNKS_COLUMNS, SLOTS] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhead_core::Dtype;

    fn rows(count: u64, columns: u64) -> DeviceRows {
        DeviceRows::new(0, Dtype::Float32, &[count], &[columns.cast_signed()], columns).unwrap()
    }

    #[test]
    fn every_chunk_and_column_has_a_block() {
        for (count, columns, grid) in
            [(1, 1, [1, 1]), (128, 512, [1, 1]), (129, 513, [2, 2]), (1000, 4096, [8, 8]), (256, 4097, [2, 9])]
        {
            let found = geometry(&rows(count, columns)).unwrap();
            assert_eq!((found.grid, found.block), (grid, [64, 1]), "{count} {columns}");
        }
        assert_eq!(add_chunks_geometry(4097), Geometry { grid: [129, 1], block: [32, 8] });
    }

    #[test]
    fn scratch_is_a_weight_for_each_chunk() {
        assert_eq!(partials(&rows(129, 100), 3), 2 * 300);
        assert_eq!(partials(&rows(0, 100), 3), 0);
    }

    #[test]
    fn sizes_that_cannot_be_counted_are_errors() {
        assert!(geometry(&rows(1 << 40, 8)).is_err());
        let head = DeviceHead { weight: 0, bias: 0, outputs: 1 << 20 };
        assert_eq!(
            length(&rows(1, 1 << 12), &head).unwrap_err().to_string(),
            "weights: expected fewer than 2^32, got 4294967296"
        );
    }
}
