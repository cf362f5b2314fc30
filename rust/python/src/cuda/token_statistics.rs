//! Token statistics from tiles of products in the memory of a CUDA device.
use super::view::CudaView;
use crate::backend::{Selected, SelectionArguments, TokenArguments, TokenGradients, TokenStatistics};
use crate::description::unsigned;
use crate::dtype::{Float32, Int64};
use crate::gate;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::{Dtype, LogitsRule};
use vhead_cuda::{
    Device, DeviceLogits, DeviceRowGradients, DeviceSelected, DeviceSelection, DeviceStatistics, ROW_STATE_BYTES,
};

/// `[N]` targets, and the biases of the vocabulary's tokens: what every tile is cut from.
struct Vocabulary {
    targets: Py<PyAny>,
    bias: Option<Py<PyAny>>,
    rows: u64,
    size: u64,
    rule: LogitsRule,
}

impl Vocabulary {
    /// The targets are not read here, since that would wait for the device.
    fn new(tokens: &TokenArguments<'_, '_>) -> PyResult<Self> {
        let (size, rule) = (tokens.vocabulary as u64, tokens.rule);
        let targets = CudaView::<Int64>::new("targets", tokens.targets)?.contiguous()?;
        let bias = tokens.bias.map(|bias| targets.beside::<Dtype>("bias", bias)?.floats()).transpose()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.count() as u64 != size) {
            return Err(wrong_length("bias", size, bias.count() as u64));
        }
        let rows = targets.count() as u64;
        let bias = bias.map(|bias| bias.into_tensor().unbind());
        Ok(Self { targets: targets.into_tensor().unbind(), bias, rows, size, rule })
    }

    fn targets<'py>(&self, py: Python<'py>) -> PyResult<CudaView<'py, Int64>> {
        CudaView::new("targets", self.targets.bind(py))
    }

    /// The tile of `products` that starts at `row` and `column`.
    fn tile<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: u64,
        column: u64,
    ) -> PyResult<(CudaView<'py, Float32>, DeviceLogits)> {
        let py = products.py();
        let products = self.targets(py)?.beside::<Float32>("products", products)?.with_contiguous_rows()?;
        let &[rows, columns] = products.sizes() else {
            return Err(PyValueError::new_err(format!("products: expected [n, v], got {:?}", products.sizes())));
        };
        let (rows, columns) = (unsigned(rows) as u64, unsigned(columns) as u64);
        for (what, count, room) in
            [("rows", rows, self.rows.saturating_sub(row)), ("columns", columns, self.size.saturating_sub(column))]
        {
            if count > room {
                return Err(wrong_length(what, room, count));
            }
        }
        let bias = match &self.bias {
            Some(bias) => CudaView::<Float32>::new("bias", bias.bind(py))?.address() + column * 4,
            None => 0,
        };
        let row_stride = unsigned(products.strides().first().copied().unwrap_or(0)) as u64;
        let products_at = products.address();
        let tile = DeviceLogits {
            products: products_at,
            row_stride,
            rows,
            columns,
            first_column: column,
            bias,
            rule: self.rule,
        };
        Ok((products, tile))
    }
}

fn wrong_length(what: &'static str, expected: u64, actual: u64) -> PyErr {
    PyValueError::new_err(format!("{what}: expected {expected} elements, got {actual}"))
}

/// What is asked for of each row besides its target, with the memory for what is known of it between two tiles.
struct Selection {
    /// int64 `[N, M]`, where there are some.
    candidates: Option<Py<PyAny>>,
    /// float32 `[N, M]`.
    candidate_logits: Py<PyAny>,
    /// int64 `[N, k]`.
    top_tokens: Py<PyAny>,
    /// float32 `[N, k]`.
    top_logits: Py<PyAny>,
    candidate_count: i64,
    top: i64,
}

impl Selection {
    /// The candidates are not read here either.
    fn new(asked: SelectionArguments<'_, '_>, targets: &CudaView<'_, Int64>) -> PyResult<Self> {
        let candidates = asked.candidates.map(|given| targets.beside::<Int64>("candidates", given)?.contiguous());
        let candidates = candidates.transpose()?;
        let rows = i64::try_from(targets.count())?;
        if let Some(given) = candidates.as_ref().filter(|given| given.sizes().first() != Some(&rows)) {
            return Err(PyValueError::new_err(format!("candidates: expected [{rows}, M], got {:?}", given.sizes())));
        }
        let candidate_count = candidates.as_ref().map_or(0, |given| given.columns() as i64);
        let top = i64::try_from(asked.top)?;
        let candidate_logits = targets.new_empty("candidate_logits", &[rows, candidate_count], Float32)?;
        let top_tokens = targets.new_empty("top_tokens", &[rows, top], Int64)?;
        let top_logits = targets.new_empty("top_logits", &[rows, top], Float32)?;
        Ok(Self {
            candidates: candidates.map(|given| given.into_tensor().unbind()),
            candidate_logits: candidate_logits.into_tensor().unbind(),
            top_tokens: top_tokens.into_tensor().unbind(),
            top_logits: top_logits.into_tensor().unbind(),
            candidate_count,
            top,
        })
    }

    /// The same for the rows from `row` on.
    fn of_rows(&self, py: Python<'_>, row: u64) -> PyResult<DeviceSelection> {
        let (candidate_count, top) = (self.candidate_count.cast_unsigned(), self.top.cast_unsigned());
        let floats = |tensor: &Py<PyAny>| Ok::<_, PyErr>(CudaView::<Float32>::new("logits", tensor.bind(py))?.address());
        let integers = |tensor: &Py<PyAny>| Ok::<_, PyErr>(CudaView::<Int64>::new("tokens", tensor.bind(py))?.address());
        let candidates = self.candidates.as_ref().map_or(Ok(0), integers)?;
        Ok(DeviceSelection {
            candidates: candidates + 8 * row * candidate_count,
            candidate_logits: floats(&self.candidate_logits)? + 4 * row * candidate_count,
            top_tokens: integers(&self.top_tokens)? + 8 * row * top,
            top_logits: floats(&self.top_logits)? + 4 * row * top,
            candidate_count,
            top,
        })
    }
}

/// Statistics of `[N]` targets, on the targets' device and torch's current stream.
struct Statistics {
    vocabulary: Vocabulary,
    states: Py<PyAny>,
    selection: Option<Selection>,
}

/// [`crate::backend::Backend::token_statistics`].
pub(super) fn statistics(
    tokens: TokenArguments<'_, '_>,
    selection: SelectionArguments<'_, '_>,
) -> PyResult<Box<dyn TokenStatistics>> {
    let vocabulary = Vocabulary::new(&tokens)?;
    let sizes = [i64::try_from(vocabulary.rows)?, (ROW_STATE_BYTES / 8).cast_signed()];
    let targets = vocabulary.targets(tokens.targets.py())?;
    let states = targets.new_empty("states", &sizes, Int64)?.into_tensor().unbind();
    let selection = if selection.is_empty() { None } else { Some(Selection::new(selection, &targets)?) };
    Ok(Box::new(Statistics { vocabulary, states, selection }))
}

impl TokenStatistics for Statistics {
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        let (py, row, column) = (products.py(), row as u64, column as u64);
        let (products, tile) = self.vocabulary.tile(products, row, column)?;
        let targets = self.vocabulary.targets(py)?.address() + row * 8;
        let states = self.states(py)?.address() + row * ROW_STATE_BYTES;
        let selection = self.selection.as_ref().map(|selection| selection.of_rows(py, row)).transpose()?;
        let (ordinal, stream) = (products.ordinal(), products.stream()?);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: the tile's rows and columns are inside the targets, states, biases and selections, as has been checked,
            // and torch promises that a tensor's sizes and strides stay inside its memory; it orders other work by the stream.
            unsafe { device.fold_logits(stream, &tile, targets, states, selection.as_ref()) }
        })
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let states = self.states(py)?;
        let sizes = [i64::try_from(self.vocabulary.rows)?];
        let new_output = || states.new_empty("statistics", &sizes, Float32);
        let outputs = [new_output()?, new_output()?, new_output()?, new_output()?, new_output()?, new_output()?];
        let [logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum] = outputs.each_ref().map(CudaView::address);
        let to = DeviceStatistics { logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum };
        let (ordinal, stream, from, rows) =
            (states.ordinal(), states.stream()?, states.address(), self.vocabulary.rows);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: there are as many states and numbers of each output as rows; the rest as in `fold`.
            unsafe { device.finish_statistics(stream, from, rows, to) }
        })?;
        Ok(outputs.into_iter().map(CudaView::into_tensor).collect())
    }

    fn finish_selected<'py>(&self, py: Python<'py>) -> PyResult<Selected<'py>> {
        let Some(selection) = &self.selection else { return Ok((None, None, None)) };
        let (states, rows) = (self.states(py)?, i64::try_from(self.vocabulary.rows)?);
        let candidate_logprobs =
            states.new_empty("candidate_logprobs", &[rows, selection.candidate_count], Float32)?;
        let top_tokens = states.new_empty("top_tokens", &[rows, selection.top], Int64)?;
        let top_logprobs = states.new_empty("top_logprobs", &[rows, selection.top], Float32)?;
        let to = DeviceSelected {
            candidate_logprobs: candidate_logprobs.address(),
            top_tokens: top_tokens.address(),
            top_logprobs: top_logprobs.address(),
        };
        let known = selection.of_rows(py, 0)?;
        let (ordinal, stream, from) = (states.ordinal(), states.stream()?, states.address());
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: each output has a number for each token that is asked for of each row; the rest as in `fold`.
            unsafe { device.finish_selected(stream, from, rows.cast_unsigned(), &known, to) }
        })?;
        let (has_candidates, has_top) = (selection.candidates.is_some(), selection.top > 0);
        Ok((
            has_candidates.then(|| candidate_logprobs.into_tensor()),
            has_top.then(|| top_tokens.into_tensor()),
            has_top.then(|| top_logprobs.into_tensor()),
        ))
    }
}

impl Statistics {
    fn states<'py>(&self, py: Python<'py>) -> PyResult<CudaView<'py, Int64>> {
        CudaView::new("states", self.states.bind(py))
    }
}

/// Gradients of log-probabilities and entropies by the products, on the targets' device.
struct Gradients {
    vocabulary: Vocabulary,
    /// Peak, `log_sum`, entropy, and the gradients of log-probabilities and entropies.
    numbers: [Py<PyAny>; 5],
}

const NUMBERS: [&str; 5] = ["peak", "log_sum", "entropy", "grad_logprobs", "grad_entropy"];

/// [`crate::backend::Backend::token_gradients`].
pub(super) fn gradients<'py>(
    tokens: TokenArguments<'_, 'py>,
    statistics: &[Bound<'py, PyAny>; 3],
    gradients: &[Bound<'py, PyAny>; 2],
) -> PyResult<Box<dyn TokenGradients>> {
    let vocabulary = Vocabulary::new(&tokens)?;
    let targets = vocabulary.targets(tokens.targets.py())?;
    let [peak, log_sum, entropy] = statistics;
    let [grad_logprobs, grad_entropy] = gradients;
    let checked = |name: &'static str, tensor: &Bound<'py, PyAny>| {
        let view = targets.beside::<Float32>(name, tensor)?.contiguous()?;
        if view.count() as u64 != vocabulary.rows {
            return Err(wrong_length(name, vocabulary.rows, view.count() as u64));
        }
        Ok(view.into_tensor().unbind())
    };
    let numbers = [
        checked(NUMBERS[0], peak)?,
        checked(NUMBERS[1], log_sum)?,
        checked(NUMBERS[2], entropy)?,
        checked(NUMBERS[3], grad_logprobs)?,
        checked(NUMBERS[4], grad_entropy)?,
    ];
    Ok(Box::new(Gradients { vocabulary, numbers }))
}

impl TokenGradients for Gradients {
    /// In float32 `out` may be the products themselves, where those are contiguous.
    fn differentiate<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: usize,
        column: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (py, row, column) = (products.py(), row as u64, column as u64);
        let out = out.unwrap_or(products);
        let (products, tile) = self.vocabulary.tile(products, row, column)?;
        let out = products.beside::<Dtype>("out", out)?;
        if out.sizes() != products.sizes() || !out.is_contiguous() {
            let (expected, actual) = (products.sizes(), out.sizes());
            return Err(PyValueError::new_err(format!("out: expected contiguous {expected:?}, got {actual:?}")));
        }
        let (address, dtype) = (out.address(), out.dtype());
        let rows = self.rows(py, row)?;
        let (ordinal, stream) = (products.ordinal(), products.stream()?);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: as in `Statistics::fold`; `out` has as many elements as the tile.
            unsafe { device.differentiate_logits(stream, &tile, &rows, dtype, address) }
        })
    }
}

impl Gradients {
    /// The numbers of the rows from `row` on.
    fn rows(&self, py: Python<'_>, row: u64) -> PyResult<DeviceRowGradients> {
        let mut addresses = [0; 5];
        for ((address, name), tensor) in addresses.iter_mut().zip(NUMBERS).zip(&self.numbers) {
            *address = CudaView::<Float32>::new(name, tensor.bind(py))?.address() + row * 4;
        }
        let [peak, log_sum, entropy, grad_logprobs, grad_entropy] = addresses;
        let targets = self.vocabulary.targets(py)?.address() + row * 8;
        Ok(DeviceRowGradients { targets, peak, log_sum, entropy, grad_logprobs, grad_entropy })
    }
}
