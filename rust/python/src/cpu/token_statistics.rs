//! Token statistics from tiles of products in the CPU's memory.
use crate::backend::{TokenArguments, TokenGradients, TokenStatistics};
use crate::dtype::{Float32, Int64};
use crate::gate;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::{LogitGradients, LogitStatistics, Statistics};

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

/// [`crate::backend::Backend::token_statistics`].
pub(super) fn statistics(tokens: TokenArguments<'_, '_>) -> PyResult<Box<dyn TokenStatistics>> {
    let (targets, bias) = read(&tokens)?;
    match LogitStatistics::new(tokens.rule, &targets, bias, tokens.vocabulary) {
        Ok(statistics) => Ok(Box::new(statistics)),
        Err(error) => Err(gate::to_python(error)),
    }
}

impl TokenStatistics for LogitStatistics {
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        let py = products.py();
        let products = TensorView::<Float32>::new("products", products)?.with_contiguous_rows()?;
        let cost = products.count() * LOGIT_COST;
        let (rows, threads) = (products.rows(), Threads::worth(py, cost)?);
        gate::run(py, cost, || Self::fold(self, &rows, row, column, threads.executor()))
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let sizes = [self.rows() as i64];
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
            gate::run(py, 0, || Self::finish(self, to))?;
        }
        Ok(outputs.into_iter().map(Output::into_tensor).collect())
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
}
