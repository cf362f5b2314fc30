//! The plain float64 twin: what the kernels should compute, written once, for tests and benchmarks.
use crate::reduce::OCTET;
use crate::returns::Kl;
use crate::{Dropout, Element, Head, Rows, TwoLayerHead};
use std::cmp::Ordering;

/// [`crate::value_head`] in float64: `[N, K]`.
#[must_use]
pub fn value_head<T: Element>(hidden: &Rows<'_, T>, head: &Head<'_>, dropout: Option<&Dropout>) -> Vec<f64> {
    let mut values = Vec::with_capacity(hidden.count() * head.outputs());
    for n in 0..hidden.count() {
        let row = row(hidden, n, dropout);
        let scale = scale(dropout);
        for k in 0..head.outputs() {
            let products = row.iter().zip(head.weight(k)).map(|(x, w)| x * f64::from(*w));
            values.push(products.fold(0.0, |a, b| a + b) * scale + f64::from(head.bias(k)));
        }
    }
    values
}

/// [`crate::two_layer`] in float64: `[N, K]`.
#[must_use]
pub fn two_layer<T: Element, W: Element>(
    hidden: &Rows<'_, T>,
    head: &TwoLayerHead<'_, W>,
    dropout: Option<&Dropout>,
) -> Vec<f64> {
    let (weight, second) = (head.first().weight(), head.second());
    let mut values = Vec::with_capacity(hidden.count() * second.outputs());
    for n in 0..hidden.count() {
        let x = row(hidden, n, dropout);
        let activation = |i: usize| {
            let products = x.iter().enumerate().map(|(h, x)| x * f64::from(weight.get(i, h).to_f32()));
            (products.fold(0.0, |a, b| a + b) * scale(dropout) + f64::from(head.first().bias(i))).max(0.0)
        };
        let activations: Vec<f64> = (0..weight.count()).map(activation).collect();
        for k in 0..second.outputs() {
            let products = activations.iter().zip(second.weight(k)).map(|(x, w)| x * f64::from(*w));
            values.push(products.fold(0.0, |a, b| a + b) + f64::from(second.bias(k)));
        }
    }
    values
}

/// Gradients in float64.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[N, H]`.
    pub hidden: Vec<f64>,
    /// `[K, H]`.
    pub weight: Vec<f64>,
    /// `[K]`.
    pub bias: Vec<f64>,
}

/// [`crate::value_head_backward`] in float64; `grad_values` is `[N, K]`.
#[must_use]
pub fn value_head_backward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
) -> Gradients {
    let (columns, outputs) = (hidden.columns(), head.outputs());
    let mut gradients = Gradients {
        hidden: vec![0.0; hidden.count() * columns],
        weight: vec![0.0; outputs * columns],
        bias: vec![0.0; outputs],
    };
    for n in 0..hidden.count() {
        let row = row(hidden, n, dropout);
        for k in 0..outputs {
            let grad = f64::from(grad_values[n * outputs + k]);
            gradients.bias[k] += grad;
            for (h, x) in row.iter().enumerate() {
                let kept = f64::from(u8::from(keep(dropout, n, h)));
                gradients.weight[k * columns + h] += grad * scale(dropout) * x;
                gradients.hidden[n * columns + h] += grad * scale(dropout) * f64::from(head.weight(k)[h]) * kept;
            }
        }
    }
    gradients
}

/// The advantages of one rollout in float64: [`crate::returns::gae`] where all lambdas are `lam`; 0 where `mask` is false.
#[must_use]
pub fn advantages(rewards: &[f32], values: &[f32], mask: &[bool], gamma: f64, lam: f64, bootstrap: f64) -> Vec<f64> {
    let (mut advantages, mut next, mut behind) = (vec![0.0; rewards.len()], bootstrap, 0.0);
    for t in (0..rewards.len()).rev().filter(|&t| mask[t]) {
        behind = f64::from(rewards[t]) + gamma * next - f64::from(values[t]) + gamma * lam * behind;
        next = f64::from(values[t]);
        advantages[t] = behind;
    }
    advantages
}

/// The rewards of one rollout's tokens in float64: [`crate::returns::token_rewards`] with a penalty.
#[must_use]
pub fn token_rewards(
    reward: f32,
    mask: &[bool],
    logprobs: &[f32],
    ref_logprobs: &[f32],
    coefficient: f64,
    kl: Kl,
) -> Vec<f64> {
    let last = mask.iter().rposition(|m| *m);
    let at = |t: usize| {
        let difference = f64::from(logprobs[t]) - f64::from(ref_logprobs[t]);
        let estimate = match kl {
            Kl::K1 => difference,
            Kl::K2 => difference.powi(2) / 2.0,
            Kl::K3 => (-difference).exp() - 1.0 + difference,
            Kl::Abs => difference.abs(),
        };
        f64::from(u8::from(last == Some(t))) * f64::from(reward) - f64::from(u8::from(mask[t])) * coefficient * estimate
    };
    (0..mask.len()).map(at).collect()
}

fn scale(dropout: Option<&Dropout>) -> f64 {
    dropout.map_or(1.0, |dropout| 65536.0 / (65536.0 - f64::from(dropout.threshold())))
}

#[expect(clippy::cast_possible_truncation, reason = "a counter word numbers the octets")]
fn keep(dropout: Option<&Dropout>, row: usize, column: usize) -> bool {
    dropout.is_none_or(|dropout| dropout.keep(row as u64, (column / OCTET) as u32)[column % OCTET])
}

fn row<T: Element>(hidden: &Rows<'_, T>, n: usize, dropout: Option<&Dropout>) -> Vec<f64> {
    let element = |h| f64::from(hidden.get(n, h).to_f32()) * f64::from(u8::from(keep(dropout, n, h)));
    (0..hidden.columns()).map(element).collect()
}

/// What a row says about tokens that are asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// Of the candidates, in their order.
    pub candidate_logprobs: Vec<f64>,
    /// The likeliest first, of equals the smaller id first.
    pub top_tokens: Vec<usize>,
    /// Of those.
    pub top_logprobs: Vec<f64>,
}

/// [`crate::LogitStatistics::select`] in float64, by sorting a row's logits.
#[must_use]
pub fn selected(logits: &[f64], candidates: &[usize], top: usize) -> Selected {
    let peak = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().fold(0.0, |sum, z| sum + (z - peak).exp()).ln();
    let logprobs = |tokens: &[usize]| tokens.iter().map(|token| logits[*token] - peak - log_sum).collect();
    let mut top_tokens: Vec<usize> = (0..logits.len()).collect();
    top_tokens.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap_or(Ordering::Equal));
    top_tokens.truncate(top);
    Selected { candidate_logprobs: logprobs(candidates), top_logprobs: logprobs(&top_tokens), top_tokens }
}
