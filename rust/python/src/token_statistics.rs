//! Token statistics from tiles of products that torch computes.
use crate::backend::{self, Selected, SelectionArguments, TokenArguments};
use crate::backends::backend_of;
use pyo3::prelude::*;
use vhead_core::LogitsRule;

/// Statistics of `[N]` targets, a tile of products at a time, where the targets are.
#[pyclass(module = "vhead._native")]
pub(crate) struct LogitStatistics(Box<dyn backend::TokenStatistics>);

#[pymethods]
impl LogitStatistics {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature, candidates=None, top=0))]
    #[expect(clippy::too_many_arguments, reason = "the targets' and their logits', and the selection's")]
    fn new(
        targets: &Bound<'_, PyAny>,
        vocabulary: usize,
        bias: Option<&Bound<'_, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
        candidates: Option<&Bound<'_, PyAny>>,
        top: usize,
    ) -> PyResult<Self> {
        let tokens = TokenArguments { targets, vocabulary, bias, rule: LogitsRule::new(scale, softcap, temperature) };
        backend_of("targets", targets)?.token_statistics(tokens, SelectionArguments { candidates, top }).map(Self)
    }

    /// Adds float32 products `[n, v]` of the rows from `row` on with the tokens from `column` on; each row's columns come in
    /// rising order, from 0 on.
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()> {
        self.0.fold(products, row, column)
    }

    /// Adds the products of all rows' hidden states `[N, H]` with the weights `[v, H]` of the tokens from `column` on, both
    /// bfloat16, which the CPU's matrix unit multiplies; columns come as in `fold`.
    fn fold_products(&mut self, hidden: &Bound<'_, PyAny>, weight: &Bound<'_, PyAny>, column: usize) -> PyResult<()> {
        self.0.fold_products(hidden, weight, column)
    }

    /// Log-probabilities, entropies, logarithms of the sums of squared probabilities, whether targets are the most
    /// probable (1 or 0), largest logits, and logarithms of the sums relative to them: float32 `[N]` each. The
    /// log-probability of a target that no tile held is NaN.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.0.finish(py)
    }

    /// Log-probabilities of the candidates, float32 `[N, M]`, and the `top` likeliest tokens and their log-probabilities,
    /// int64 and float32 `[N, top]`; `None` for what was not asked for.
    fn finish_selected<'py>(&self, py: Python<'py>) -> PyResult<Selected<'py>> {
        self.0.finish_selected(py)
    }
}

/// Gradients of log-probabilities and entropies by the products, a tile at a time, where the targets are.
#[pyclass(module = "vhead._native", frozen)]
pub(crate) struct LogitGradients(Box<dyn backend::TokenGradients>);

#[pymethods]
impl LogitGradients {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature, statistics, gradients))]
    #[expect(clippy::too_many_arguments, reason = "those of the statistics, and two lists")]
    fn new<'py>(
        targets: &Bound<'py, PyAny>,
        vocabulary: usize,
        bias: Option<&Bound<'py, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
        statistics: [Bound<'py, PyAny>; 3],
        gradients: [Bound<'py, PyAny>; 2],
    ) -> PyResult<Self> {
        let rule = LogitsRule::new(scale, softcap, temperature);
        let tokens = TokenArguments { targets, vocabulary, bias, rule };
        backend_of("targets", targets)?.token_gradients(tokens, &statistics, &gradients).map(Self)
    }

    /// Writes the gradients of float32 products `[n, v]` to `out`, contiguous and of the same sizes, in float32, bfloat16 or
    /// float16; over the products, which must be contiguous then, where it is `None`. The CPU takes `None` only.
    #[pyo3(signature = (products, row, column, out=None))]
    fn differentiate<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: usize,
        column: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        self.0.differentiate(products, row, column, out)
    }

    /// Adds the gradients of all rows' hidden states `[N, H]` by the tokens from `column` on to `grad_hidden`, float32, and
    /// writes those of these tokens' weights `[v, H]` to `grad_weight`, bfloat16 as states and weights; the CPU's matrix unit
    /// multiplies.
    #[pyo3(signature = (hidden, weight, column, grad_hidden=None, grad_weight=None))]
    fn add_products(
        &self,
        hidden: &Bound<'_, PyAny>,
        weight: &Bound<'_, PyAny>,
        column: usize,
        grad_hidden: Option<&Bound<'_, PyAny>>,
        grad_weight: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.0.add_products(hidden, weight, column, grad_hidden, grad_weight)
    }
}
