//! Token statistics from tiles of products that torch computes.
use crate::gate;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use crate::torch::Dtype;
use pyo3::prelude::*;
use vhead_core::{LogitsRule, Serial, Statistics};

/// How many plain elements a logit is worth.
const LOGIT_COST: usize = 4;

fn threads(py: Python<'_>, cost: usize) -> PyResult<Threads> {
    if cost > gate::SMALL { Threads::now(py) } else { Ok(Threads::Caller(Serial)) }
}

fn integers(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    TensorView::new(name, tensor, &[Dtype::Int64])?.integers()
}

fn floats(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    TensorView::new(name, tensor, &Dtype::FLOATS)?.owned_floats()
}

/// Statistics of `[N]` targets, a tile of products at a time.
#[pyclass(module = "vhead._native")]
pub(crate) struct LogitStatistics(vhead_core::LogitStatistics);

#[pymethods]
impl LogitStatistics {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature))]
    fn new(
        targets: &Bound<'_, PyAny>,
        vocabulary: usize,
        bias: Option<&Bound<'_, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
    ) -> PyResult<Self> {
        let (rule, bias) = (LogitsRule::new(scale, softcap, temperature), bias.map(|b| floats("bias", b)).transpose()?);
        let targets = integers("targets", targets)?;
        vhead_core::LogitStatistics::new(rule, &targets, bias, vocabulary).map(Self).map_err(gate::to_python)
    }

    /// Adds float32 products `[n, v]` of the rows from `row` on with the tokens from `column` on.
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        let py = products.py();
        let products = TensorView::new("products", products, &[Dtype::Float32])?.with_contiguous_rows()?;
        let cost = products.count() * LOGIT_COST;
        let (rows, threads, statistics) = (products.rows::<f32>(), threads(py, cost)?, &mut self.0);
        gate::run(py, cost, || statistics.fold(&rows, row, column, threads.executor()))
    }

    /// Log-probabilities, entropies, logarithms of the sums of squared probabilities, whether targets are the most
    /// probable (1 or 0), largest logits, and logarithms of the sums relative to them: float32 `[N]` each.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let sizes = [self.0.rows() as i64];
        let mut outputs = (0..6).map(|_| Output::new(py, &sizes, Dtype::Float32)).collect::<PyResult<Vec<_>>>()?;
        if let [logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum] = &mut outputs[..] {
            let to = Statistics {
                logprobs: logprobs.elements(),
                entropy: entropy.elements(),
                log_sum_p_squared: log_sum_p_squared.elements(),
                is_top1: is_top1.elements(),
                peak: peak.elements(),
                log_sum: log_sum.elements(),
            };
            gate::run(py, 0, || self.0.finish(to))?;
        }
        Ok(outputs.into_iter().map(Output::into_tensor).collect())
    }
}

/// Gradients of log-probabilities and entropies by the products, a tile at a time.
#[pyclass(module = "vhead._native", frozen)]
pub(crate) struct LogitGradients(vhead_core::LogitGradients);

#[pymethods]
impl LogitGradients {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature, statistics, gradients))]
    #[expect(clippy::too_many_arguments, reason = "those of the statistics, and two lists")]
    fn new(
        targets: &Bound<'_, PyAny>,
        vocabulary: usize,
        bias: Option<&Bound<'_, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
        statistics: [Bound<'_, PyAny>; 3],
        gradients: [Bound<'_, PyAny>; 2],
    ) -> PyResult<Self> {
        let (rule, bias) = (LogitsRule::new(scale, softcap, temperature), bias.map(|b| floats("bias", b)).transpose()?);
        let targets = integers("targets", targets)?;
        let [peak, log_sum, entropy] = &statistics;
        let (peak, log_sum, entropy) =
            (floats("peak", peak)?, floats("log_sum", log_sum)?, floats("entropy", entropy)?);
        let [of_logprobs, of_entropy] = &gradients;
        let (of_logprobs, of_entropy) = (floats("grad_logprobs", of_logprobs)?, floats("grad_entropy", of_entropy)?);
        let (statistics, gradients) = ([&peak[..], &log_sum, &entropy], [&of_logprobs[..], &of_entropy]);
        vhead_core::LogitGradients::new(rule, &targets, bias, vocabulary, statistics, gradients)
            .map(Self)
            .map_err(gate::to_python)
    }

    /// Overwrites contiguous float32 products `[n, v]` with their gradients.
    fn differentiate(&self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        let py = products.py();
        let mut products = TensorView::new("products", products, &[Dtype::Float32])?;
        let (cost, columns) = (products.count() * LOGIT_COST, products.columns());
        let (threads, gradients, to) = (threads(py, cost)?, &self.0, products.overwritten()?);
        gate::run(py, cost, || gradients.differentiate(to, columns, row, column, threads.executor()))
    }
}
