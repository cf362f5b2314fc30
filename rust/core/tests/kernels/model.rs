//! The documented arithmetic, written a second time: element by element, in the order that the documentation gives.
use crate::support::{Case, Outcome};
use std::ops::Add;
use vhead_core::reduce::{LANES, OCTET, OCTETS};
use vhead_core::{CHUNK, Dropout, Element, Result, SLOTS};

fn keep(dropout: Option<&Dropout>, row: usize, column: usize) -> bool {
    dropout.is_none_or(|dropout| dropout.keep(row as u64, (column / OCTET) as u32)[column % OCTET])
}

/// What [`Case::run`] has to give.
pub(crate) fn outcome<T: Element>(case: &Case<T>) -> Result<Outcome> {
    let x: Vec<f32> = case.data.iter().map(|x| x.to_f32()).collect();
    Ok(Outcome { values: values(case, &x), hidden: hidden(case), weight: weight(case, &x), bias: bias(case) })
}

fn scale<T>(case: &Case<T>) -> f32 {
    case.dropout.map_or(1.0, |dropout| 65536.0 / (65536.0 - f32::from(dropout.threshold())))
}

fn values<T>(case: &Case<T>, x: &[f32]) -> Vec<f32> {
    let mut values = Vec::new();
    for n in 0..case.rows {
        for k in 0..case.outputs {
            let mut lanes = [0.0_f32; LANES];
            for h in 0..case.columns {
                let w = if keep(case.dropout.as_ref(), n, h) { case.weight[k * case.columns + h] } else { 0.0 };
                lanes[h % LANES] = x[n * case.columns + h].mul_add(w, lanes[h % LANES]);
            }
            values.push(fold(&lanes).mul_add(scale(case), case.bias[k]));
        }
    }
    values
}

pub(crate) fn fold<T: Copy + Add<Output = T>>(lanes: &[T; LANES]) -> T {
    let mut sums: Vec<T> = lanes.to_vec();
    for _ in 0..3 {
        sums = sums.chunks(2).map(|pair| pair[0] + pair[1]).collect();
    }
    assert_eq!(sums.len(), OCTETS);
    while sums.len() > 1 {
        let half = sums.len() / 2;
        sums = (0..half).map(|i| sums[i] + sums[i + half]).collect();
    }
    sums[0]
}

fn hidden<T: Element>(case: &Case<T>) -> Vec<f32> {
    let mut gradient = Vec::new();
    for n in 0..case.rows {
        for h in 0..case.columns {
            let kept = keep(case.dropout.as_ref(), n, h);
            let term = |k: usize| {
                let weight = if kept { case.weight[k * case.columns + h] } else { 0.0 };
                (case.grad_values[n * case.outputs + k] * scale(case), weight)
            };
            let mut sum = term(0).0 * term(0).1;
            for k in 1..case.outputs {
                sum = term(k).0.mul_add(term(k).1, sum);
            }
            gradient.push(T::from_f32(sum).to_f32());
        }
    }
    gradient
}

fn weight<T>(case: &Case<T>, x: &[f32]) -> Vec<f32> {
    let mut gradient = Vec::new();
    for k in 0..case.outputs {
        for h in 0..case.columns {
            let mut slots = [0.0_f32; SLOTS];
            for chunk in 0..case.rows.div_ceil(CHUNK) {
                let mut partial = 0.0_f32;
                for n in chunk * CHUNK..case.rows.min((chunk + 1) * CHUNK) {
                    let gs = case.grad_values[n * case.outputs + k] * scale(case);
                    let gs = if keep(case.dropout.as_ref(), n, h) { gs } else { 0.0 };
                    partial = gs.mul_add(x[n * case.columns + h], partial);
                }
                slots[chunk % SLOTS] += partial;
            }
            let [a, b, c, d, e, f, g, h] = slots;
            gradient.push(((a + e) + (c + g)) + ((b + f) + (d + h)));
        }
    }
    gradient
}

fn bias<T>(case: &Case<T>) -> Vec<f32> {
    let column = |k: usize| {
        let mut lanes = [0.0_f64; LANES];
        (0..case.rows).for_each(|n| lanes[n % LANES] += f64::from(case.grad_values[n * case.outputs + k]));
        fold(&lanes) as f32
    };
    (0..case.outputs).map(column).collect()
}
