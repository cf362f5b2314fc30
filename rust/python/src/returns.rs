//! Advantages and returns of numpy arrays, without torch.
use crate::buffers::{elements, overwritten};
use crate::gate;
use crate::threads::Threads;
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::returns::{self, Discounts, Kl, Masked, Moments, Penalty, Rollouts};

fn optional<'a, T: Element>(name: &str, buffer: Option<&'a PyBuffer<T>>) -> PyResult<Option<&'a [T]>> {
    buffer.map(|buffer| elements(name, buffer)).transpose()
}

/// Writes advantages and returns; all arrays are flat.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "those of `vhead.returns.gae`")]
pub(crate) fn gae(
    py: Python<'_>,
    rewards: PyBuffer<f32>,
    values: Option<PyBuffer<f32>>,
    mask: Option<PyBuffer<u8>>,
    offsets: PyBuffer<i64>,
    gamma: f64,
    lam: Vec<f64>,
    value_lam: Option<Vec<f64>>,
    bootstrap: Option<PyBuffer<f32>>,
    carry: bool,
    mut advantages: PyBuffer<f32>,
    mut returns: Option<PyBuffer<f32>>,
    threads: Option<usize>,
) -> PyResult<()> {
    let rollouts = (elements("offsets", &offsets)?, optional("mask", mask.as_ref())?);
    let (rewards, values) = (elements("rewards", &rewards)?, optional("values", values.as_ref())?);
    let bootstrap = optional("bootstrap", bootstrap.as_ref())?;
    let advantages = overwritten("advantages", &mut advantages)?;
    let returns = returns.as_mut().map(|returns| overwritten("returns", returns)).transpose()?;
    let discounts = Discounts { gamma, lam: &lam, value_lam: value_lam.as_deref() };
    let masked = if carry { Masked::Carried } else { Masked::Zero };
    let threads = Threads::without_torch(py, rewards.len(), threads)?;
    gate::run(py, rewards.len(), || {
        let rollouts = Rollouts::new(rollouts.0, rollouts.1)?;
        let executor = threads.executor();
        returns::gae(&rollouts, rewards, values, bootstrap, &discounts, masked, advantages, returns, executor)
    })
}

/// Writes the reward of each token; all arrays are flat.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "those of `vhead.returns.token_rewards`")]
pub(crate) fn token_rewards(
    py: Python<'_>,
    reward: PyBuffer<f32>,
    mask: Option<PyBuffer<u8>>,
    offsets: PyBuffer<i64>,
    logprobs: Option<(PyBuffer<f32>, PyBuffer<f32>)>,
    kl_coef: f64,
    kl: &str,
    mut rewards: PyBuffer<f32>,
    threads: Option<usize>,
) -> PyResult<()> {
    let rollouts = (elements("offsets", &offsets)?, optional("mask", mask.as_ref())?);
    let (reward, rewards) = (elements("reward", &reward)?, overwritten("rewards", &mut rewards)?);
    let kl = kl_estimate(kl)?;
    let penalty = match &logprobs {
        Some((logprobs, ref_logprobs)) => Some(Penalty {
            logprobs: elements("logprobs", logprobs)?,
            ref_logprobs: elements("ref_logprobs", ref_logprobs)?,
            coefficient: kl_coef,
            kl,
        }),
        None => None,
    };
    let threads = Threads::without_torch(py, rewards.len(), threads)?;
    gate::run(py, rewards.len(), || {
        let rollouts = Rollouts::new(rollouts.0, rollouts.1)?;
        returns::token_rewards(&rollouts, reward, penalty.as_ref(), rewards, threads.executor())
    })
}

fn kl_estimate(name: &str) -> PyResult<Kl> {
    match name {
        "k1" => Ok(Kl::K1),
        "k2" => Ok(Kl::K2),
        "k3" => Ok(Kl::K3),
        "abs" => Ok(Kl::Abs),
        _ => Err(PyValueError::new_err(format!("kl: expected k1, k2, k3 or abs, got {name}"))),
    }
}

/// Writes `x` with mean 0 and variance 1 over the places of `mask`, whose count is the result; nothing is written where that
/// is below 2. Masked places become 0, or are treated as the others where `everywhere`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "those of `vhead.returns.whiten`, and what conventions differ in")]
pub(crate) fn whiten(
    py: Python<'_>,
    x: PyBuffer<f32>,
    mask: Option<PyBuffer<u8>>,
    shift_mean: bool,
    unbiased: bool,
    everywhere: bool,
    mut whitened: PyBuffer<f32>,
    threads: Option<usize>,
) -> PyResult<usize> {
    const EPSILON: f64 = 1e-8;
    let (x, mask) = (elements("x", &x)?, optional("mask", mask.as_ref())?);
    let whitened = overwritten("whitened", &mut whitened)?;
    let threads = Threads::without_torch(py, x.len(), threads)?;
    gate::run(py, x.len(), || {
        let moments = Moments::new(x, None, mask, threads.executor())?;
        if moments.count > 1 {
            let count = moments.count as f64;
            let bessel = if unbiased { count / (count - 1.0) } else { 1.0 };
            let scale = 1.0 / (moments.variance * bessel + EPSILON).sqrt();
            let rule = [moments.mean, scale, if shift_mean { 0.0 } else { moments.mean }];
            returns::rescale(x, mask.filter(|_| !everywhere), rule, whitened, threads.executor())?;
        }
        Ok(moments.count)
    })
}

/// The share of the returns' variance that the values explain.
#[pyfunction]
pub(crate) fn explained_variance(
    py: Python<'_>,
    values: PyBuffer<f32>,
    returns: PyBuffer<f32>,
    mask: Option<PyBuffer<u8>>,
    threads: Option<usize>,
) -> PyResult<f64> {
    let (values, returns) = (elements("values", &values)?, elements("returns", &returns)?);
    let mask = optional("mask", mask.as_ref())?;
    let threads = Threads::without_torch(py, values.len(), threads)?;
    gate::run(py, values.len(), || returns::explained_variance(values, returns, mask, threads.executor()))
}
