//! Token statistics from tiles of products in the CPU's memory.
use crate::backend::{Selected, SelectionArguments, TokenArguments, TokenGradients, TokenStatistics};
use crate::dtype::{Float32, Int64};
use crate::gate;
use crate::matrix_unit::bf16_rows;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use half::bf16;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::{Dtype, LogitGradients, LogitStatistics, ProductGradients, Statistics};

/// How many plain elements a logit is worth.
const LOGIT_COST: usize = 4;

fn floats(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    TensorView::new(name, tensor)?.owned_floats()
}

/// Targets, and the vocabulary's biases.
fn read(tokens: &TokenArguments<'_, '_>) -> PyResult<(Vec<i64>, Option<Vec<f32>>)> {
    let bias = tokens.bias.map(|bias| floats("bias", bias)).transpose()?;
    Ok((TensorView::<Int64>::new("targets", tokens.targets)?.integers()?, bias))
}

/// Statistics, and what else is asked for of each row.
struct CpuStatistics {
    of: LogitStatistics,
    /// Candidates of each row, where there are some.
    candidates: Option<i64>,
    top: i64,
}

/// [`crate::backend::Backend::token_statistics`].
pub(super) fn statistics(
    tokens: TokenArguments<'_, '_>,
    selection: SelectionArguments<'_, '_>,
) -> PyResult<Box<dyn TokenStatistics>> {
    let (targets, bias) = read(&tokens)?;
    let mut of = LogitStatistics::new(tokens.rule, &targets, bias, tokens.vocabulary).map_err(gate::to_python)?;
    let candidates = selection.candidates.map(|given| TensorView::<Int64>::new("candidates", given)).transpose()?;
    if !selection.is_empty() {
        let given = candidates.as_ref().map_or(Ok(Vec::new()), TensorView::integers)?;
        of.select(&given, selection.top).map_err(gate::to_python)?;
    }
    let candidates = candidates.map(|candidates| candidates.columns() as i64);
    Ok(Box::new(CpuStatistics { of, candidates, top: i64::try_from(selection.top)? }))
}

impl TokenStatistics for CpuStatistics {
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        let py = products.py();
        let products = TensorView::<Float32>::new("products", products)?.with_contiguous_rows()?;
        let cost = products.count() * LOGIT_COST;
        let (rows, threads) = (products.rows(), Threads::worth(py, cost)?);
        gate::run(py, cost, || self.of.fold(&rows, row, column, threads.executor()))
    }

    fn fold_products(&mut self, hidden: &Bound<'_, PyAny>, weight: &Bound<'_, PyAny>, column: usize) -> PyResult<()> {
        let (py, cost) = (hidden.py(), usize::MAX);
        let (hidden, weight) = (bf16_rows("hidden", hidden)?, bf16_rows("weight", weight)?);
        let (hidden, weight, threads) = (hidden.rows::<bf16>(), weight.rows::<bf16>(), Threads::now(py)?);
        gate::run(py, cost, || self.of.fold_products(&hidden, &weight, column, threads.executor()))
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let sizes = [self.of.rows() as i64];
        let mut outputs = (0..6).map(|_| Output::<f32>::new(py, &sizes)).collect::<PyResult<Vec<_>>>()?;
        if let [logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum] = &mut outputs[..] {
            let to = Statistics {
                logprobs: logprobs.elements(),
                entropy: entropy.elements(),
                log_sum_p_squared: log_sum_p_squared.elements(),
                is_top1: is_top1.elements(),
                peak: peak.elements(),
                log_sum: log_sum.elements(),
            };
            gate::run(py, 0, || self.of.finish(to))?;
        }
        Ok(outputs.into_iter().map(Output::into_tensor).collect())
    }

    fn finish_selected<'py>(&self, py: Python<'py>) -> PyResult<Selected<'py>> {
        let rows = self.of.rows() as i64;
        let mut candidates = Output::<f32>::new(py, &[rows, self.candidates.unwrap_or(0)])?;
        let mut tokens = Output::<i64>::integers(py, &[rows, self.top])?;
        let mut logprobs = Output::<f32>::new(py, &[rows, self.top])?;
        let to = vhead_core::Selected {
            candidate_logprobs: candidates.elements(),
            top_tokens: tokens.elements(),
            top_logprobs: logprobs.elements(),
        };
        gate::run(py, 0, || self.of.finish_selected(to))?;
        let (has_candidates, has_top) = (self.candidates.is_some(), self.top > 0);
        Ok((
            has_candidates.then(|| candidates.into_tensor()),
            has_top.then(|| tokens.into_tensor()),
            has_top.then(|| logprobs.into_tensor()),
        ))
    }
}

/// [`crate::backend::Backend::token_gradients`].
pub(super) fn gradients<'py>(
    tokens: TokenArguments<'_, 'py>,
    statistics: &[Bound<'py, PyAny>; 3],
    gradients: &[Bound<'py, PyAny>; 2],
) -> PyResult<Box<dyn TokenGradients>> {
    let (targets, bias) = read(&tokens)?;
    let [peak, log_sum, entropy] = statistics;
    let (peak, log_sum, entropy) = (floats("peak", peak)?, floats("log_sum", log_sum)?, floats("entropy", entropy)?);
    let [grad_logprobs, grad_entropy] = gradients;
    let (grad_logprobs, grad_entropy) =
        (floats("grad_logprobs", grad_logprobs)?, floats("grad_entropy", grad_entropy)?);
    let (statistics, gradients) = ([&peak[..], &log_sum, &entropy], [&grad_logprobs[..], &grad_entropy]);
    match LogitGradients::new(tokens.rule, &targets, bias, tokens.vocabulary, statistics, gradients) {
        Ok(gradients) => Ok(Box::new(gradients)),
        Err(error) => Err(gate::to_python(error)),
    }
}

impl TokenGradients for LogitGradients {
    fn differentiate<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: usize,
        column: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        if out.is_some() {
            return Err(PyValueError::new_err("out: expected None on the CPU, which writes over the products"));
        }
        let py = products.py();
        let mut products = TensorView::<Float32>::new("products", products)?;
        let (cost, columns) = (products.count() * LOGIT_COST, products.columns());
        let (threads, to) = (Threads::worth(py, cost)?, products.overwritten()?);
        gate::run(py, cost, || Self::differentiate(self, to, columns, row, column, threads.executor()))
    }

    fn add_products(
        &self,
        hidden: &Bound<'_, PyAny>,
        weight: &Bound<'_, PyAny>,
        column: usize,
        grad_hidden: Option<&Bound<'_, PyAny>>,
        grad_weight: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (py, cost) = (hidden.py(), usize::MAX);
        let (hidden, weight) = (bf16_rows("hidden", hidden)?, bf16_rows("weight", weight)?);
        let mut of_hidden = grad_hidden.map(|to| TensorView::<Float32>::new("grad_hidden", to)).transpose()?;
        let mut of_weight = grad_weight.map(|to| TensorView::<Dtype>::new("grad_weight", to)).transpose()?;
        let to = ProductGradients {
            hidden: of_hidden.as_mut().map(TensorView::overwritten).transpose()?,
            weight: of_weight.as_mut().map(TensorView::overwritten_halves).transpose()?,
        };
        let (hidden, weight, threads) = (hidden.rows::<bf16>(), weight.rows::<bf16>(), Threads::now(py)?);
        gate::run(py, cost, || Self::add_products(self, &hidden, &weight, column, to, threads.executor()))
    }
}
