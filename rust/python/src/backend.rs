//! What a kind of device has so that this package's kernels run there. [`crate::backends`] has the table.
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_core::LogitsRule;

/// A head and what it is applied to, as Python gave them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadArguments<'a, 'py> {
    /// `[..., H]`: their device is where the work is done.
    pub(crate) hidden: &'a Bound<'py, PyAny>,
    /// `[K, H]` or `[H]`.
    pub(crate) weight: &'a Bound<'py, PyAny>,
    /// `[K]`.
    pub(crate) bias: Option<&'a Bound<'py, PyAny>>,
}

/// Dropout, as Python gave it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropoutArguments<'a, 'py> {
    /// Probability that an element is dropped.
    pub(crate) p: f64,
    /// An int64 tensor with one element, or an integer.
    pub(crate) seed: Option<&'a Bound<'py, PyAny>>,
}

impl DropoutArguments<'_, '_> {
    /// The seed, where it is a number of Python's.
    pub(crate) fn number(&self) -> PyResult<Option<u64>> {
        match self.seed {
            Some(seed) if !seed.hasattr("device")? => Ok(Some(seed.extract::<i64>()?.cast_unsigned())),
            _ => Ok(None),
        }
    }

    /// `rule`, which was made with a zero in the place of a seed that is missing.
    ///
    /// # Errors
    /// `ValueError` where something is dropped and there is no seed.
    pub(crate) fn checked<T>(&self, rule: Option<T>) -> PyResult<Option<T>> {
        if rule.is_some() && self.seed.is_none() {
            return Err(PyValueError::new_err("seed: expected an int64 tensor with dropout, got None"));
        }
        Ok(rule)
    }
}

/// `[N]` targets and what makes logits of their rows' products, as Python gave them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenArguments<'a, 'py> {
    /// `[N]`, int64: their device is where the work is done.
    pub(crate) targets: &'a Bound<'py, PyAny>,
    /// Tokens of the vocabulary: `V`.
    pub(crate) vocabulary: usize,
    /// `[V]`.
    pub(crate) bias: Option<&'a Bound<'py, PyAny>>,
    pub(crate) rule: LogitsRule,
}

/// Tokens of each row that are asked for besides its target, as Python gave them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SelectionArguments<'a, 'py> {
    /// `[N, M]`, int64.
    pub(crate) candidates: Option<&'a Bound<'py, PyAny>>,
    /// How many of the likeliest tokens.
    pub(crate) top: usize,
}

impl SelectionArguments<'_, '_> {
    /// Whether there is nothing to select.
    pub(crate) fn is_empty(&self) -> bool {
        self.candidates.is_none() && self.top == 0
    }
}

/// Log-probabilities of candidates, and the likeliest tokens and theirs, each where it was asked for.
pub(crate) type Selected<'py> = (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

/// Gradients of hidden states, weight and bias, each where it was asked for.
pub(crate) type HeadGradients<'py> = (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

/// A kind of device. Every kernel follows `vhead_core`'s order of additions and its dropout mask.
pub(crate) trait Backend: Sync {
    /// torch's name of such devices: `cpu`.
    fn device(&self) -> &'static str;

    /// The key under which torch's dispatcher knows them.
    fn dispatch_key(&self) -> &'static str;

    /// Whether `tensor` is on such a device; not so for what is no tensor.
    fn holds(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool>;

    /// Adds what `vhead.backends()` says about these devices to `row`.
    fn describe(&self, row: &Bound<'_, PyDict>) -> PyResult<()>;

    /// Why device `ordinal` has no kernels; `None` where it has, and they are loaded then.
    fn absence(&self, py: Python<'_>, ordinal: i32) -> PyResult<Option<String>>;

    /// The value of each row, float32.
    fn value_head<'py>(
        &self,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>>;

    /// [`Backend::value_head`] without dropout; `None` where an argument does not fit, or the device's kernels have not been
    /// loaded yet.
    fn try_value_head<'py>(&self, head: HeadArguments<'_, 'py>) -> PyResult<Option<Bound<'py, PyAny>>>;

    /// Gradients by that of the values, each where it is `needed`.
    fn value_head_backward<'py>(
        &self,
        grad: &Bound<'py, PyAny>,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
        needed: [bool; 3],
    ) -> PyResult<HeadGradients<'py>>;

    /// Statistics of tokens of which nothing is known yet.
    fn token_statistics(
        &self,
        tokens: TokenArguments<'_, '_>,
        selection: SelectionArguments<'_, '_>,
    ) -> PyResult<Box<dyn TokenStatistics>>;

    /// Gradients by the products, from `statistics` (peak, `log_sum`, entropy) and the gradients of log-probability and
    /// entropy, `[N]` each.
    fn token_gradients<'py>(
        &self,
        tokens: TokenArguments<'_, 'py>,
        statistics: &[Bound<'py, PyAny>; 3],
        gradients: &[Bound<'py, PyAny>; 2],
    ) -> PyResult<Box<dyn TokenGradients>>;
}

/// Statistics of `[N]` targets, a tile of products at a time.
pub(crate) trait TokenStatistics: Send + Sync {
    /// Adds float32 products `[n, v]` of the rows from `row` on with the tokens from `column` on.
    fn fold(&mut self, products: &Bound<'_, PyAny>, row: usize, column: usize) -> PyResult<()>;

    /// Adds the products of all rows' hidden states `[N, H]` with the weights `[v, H]` of the tokens from `column` on, where
    /// this backend multiplies them itself.
    fn fold_products(
        &mut self,
        _hidden: &Bound<'_, PyAny>,
        _weight: &Bound<'_, PyAny>,
        _column: usize,
    ) -> PyResult<()> {
        Err(PyRuntimeError::new_err("only the CPU's matrix unit multiplies by itself"))
    }

    /// Six tensors, float32 `[N]` each.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>>;

    /// What was selected: float32 `[N, M]`, int64 `[N, k]` and float32 `[N, k]`.
    fn finish_selected<'py>(&self, py: Python<'py>) -> PyResult<Selected<'py>>;
}

/// Gradients of log-probabilities and entropies by the products, a tile at a time.
pub(crate) trait TokenGradients: Send + Sync {
    /// Writes the gradients of float32 products `[n, v]` to `out`; over the products where that is `None`.
    fn differentiate<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: usize,
        column: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()>;

    /// Adds the gradients of all rows' hidden states `[N, H]` by the tokens from `column` on to `grad_hidden`, float32, and
    /// writes those of these tokens' weights `[v, H]` to `grad_weight`, where this backend multiplies itself.
    fn add_products(
        &self,
        _hidden: &Bound<'_, PyAny>,
        _weight: &Bound<'_, PyAny>,
        _column: usize,
        _grad_hidden: Option<&Bound<'_, PyAny>>,
        _grad_weight: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Err(PyRuntimeError::new_err("only the CPU's matrix unit multiplies by itself"))
    }
}

/// Whether an attribute of a tensor is there and true.
pub(crate) fn is_true(tensor: &Bound<'_, PyAny>, attribute: &Bound<'_, pyo3::types::PyString>) -> PyResult<bool> {
    match tensor.getattr_opt(attribute)? {
        Some(value) => value.is_truthy(),
        None => Ok(false),
    }
}
