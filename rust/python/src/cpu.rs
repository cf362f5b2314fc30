//! The CPU: `vhead_core`'s kernels on torch's memory.
use crate::backend::{
    Backend, DropoutArguments, HeadArguments, HeadGradients, SelectionArguments, TokenArguments, TokenGradients,
    TokenStatistics, is_true,
};
use crate::threads::Threads;
use crate::torch::Torch;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_core::Level;

mod token_statistics;
mod value_head;

/// torch's CPU tensors.
pub(crate) struct Cpu;

impl Backend for Cpu {
    fn device(&self) -> &'static str {
        "cpu"
    }

    fn dispatch_key(&self) -> &'static str {
        "CPU"
    }

    fn holds(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(is_true(tensor, intern!(tensor.py(), "is_cpu"))? && !vhead_cuda::takes_host_memory())
    }

    fn describe(&self, row: &Bound<'_, PyDict>) -> PyResult<()> {
        let py = row.py();
        let threads = Threads::now(py)?;
        row.set_item("simd", Level::best().name())?;
        row.set_item("simd_available", Level::available().into_iter().map(Level::name).collect::<Vec<_>>())?;
        row.set_item("threads", threads.executor().threads())?;
        row.set_item("thread_source", threads.source())?;
        row.set_item("tensor_view", if Torch::get(py)?.exchange().is_some() { "exchange" } else { "attributes" })?;
        Ok(())
    }

    fn absence(&self, _py: Python<'_>, _ordinal: i32) -> PyResult<Option<String>> {
        Ok(None)
    }

    fn value_head<'py>(
        &self,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        value_head::value_head(head, dropout)
    }

    fn try_value_head<'py>(&self, head: HeadArguments<'_, 'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        value_head::try_value_head(head)
    }

    fn value_head_backward<'py>(
        &self,
        grad: &Bound<'py, PyAny>,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
        needed: [bool; 3],
    ) -> PyResult<HeadGradients<'py>> {
        value_head::value_head_backward(grad, head, dropout, needed)
    }

    fn token_statistics(
        &self,
        tokens: TokenArguments<'_, '_>,
        selection: SelectionArguments<'_, '_>,
    ) -> PyResult<Box<dyn TokenStatistics>> {
        token_statistics::statistics(tokens, selection)
    }

    fn token_gradients<'py>(
        &self,
        tokens: TokenArguments<'_, 'py>,
        statistics: &[Bound<'py, PyAny>; 3],
        gradients: &[Bound<'py, PyAny>; 2],
    ) -> PyResult<Box<dyn TokenGradients>> {
        token_statistics::gradients(tokens, statistics, gradients)
    }
}
