//! Errors against the float64 twin stay below the bound of the documented order of additions.
use crate::for_each_dtype;
use crate::support::{Case, PROBABILITIES, WIDTHS};
use half::bf16;
use vhead_core::{Element, Level, Result, reference};

/// Half a unit in the last place of float32.
const U: f64 = 1.0 / 16_777_216.0;

/// Bound of a value's error: each product passes at most `H / 256` additions of its lane, 8 of the fold, and the last step.
fn bound<T: Element>(case: &Case<T>, row: usize, output: usize) -> f64 {
    let weight = &case.weight[output * case.columns..][..case.columns];
    let data = &case.data[row * case.columns..][..case.columns];
    let size: f64 = data.iter().zip(weight).fold(0.0, |sum, (x, w)| sum + f64::from((x.to_f32() * w).abs()));
    let scale = case.dropout.map_or(1.0, |dropout| f64::from(dropout.scale()));
    let steps = case.columns.div_ceil(256) as f64 + 10.0;
    steps * U * size * scale + U * f64::from(case.bias[output].abs())
}

/// The largest error of `values`, as a share of its bound.
fn worst<T: Element>(case: &Case<T>, values: &[f32]) -> Result<f64> {
    let twin = reference::value_head(&case.hidden()?, &case.head()?, case.dropout.as_ref());
    let share = |(i, (value, twin)): (usize, (&f32, &f64))| {
        (f64::from(*value) - twin).abs() / bound(case, i / case.outputs, i % case.outputs)
    };
    Ok(values.iter().zip(&twin).enumerate().map(share).fold(0.0, f64::max))
}

#[test]
fn values_are_those_of_the_twin() -> Result<()> {
    for columns in WIDTHS {
        for p in PROBABILITIES {
            for_each_dtype!(values_are_close(columns, p));
        }
    }
    Ok(())
}

fn values_are_close<T: Element>(columns: usize, p: f64) -> Result<()> {
    let case = Case::<T>::new(4, columns, 2, p)?;
    let worst = worst(&case, &case.run(Level::best())?.values)?;
    assert!(worst <= 1.0, "{worst} of the bound, {} {columns} {p}", T::DTYPE.name());
    Ok(())
}

/// Negative control: rounding the products' sum to bfloat16, as a head in the hidden dtype does, is far outside the bound.
#[test]
fn values_rounded_to_bfloat16_are_not() -> Result<()> {
    let case = Case::<bf16>::new(16, 2048, 1, 0.1)?;
    let values: Vec<f32> = case.run(Level::best())?.values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
    assert!(worst(&case, &values)? > 10.0);
    Ok(())
}

#[test]
fn gradients_are_those_of_the_twin() -> Result<()> {
    for p in PROBABILITIES {
        for_each_dtype!(gradients_are_close(p));
    }
    Ok(())
}

fn gradients_are_close<T: Element>(p: f64) -> Result<()> {
    let case = Case::<T>::new(300, 70, 2, p)?;
    let outcome = case.run(Level::best())?;
    let twin = reference::value_head_backward(&case.hidden()?, &case.head()?, case.dropout.as_ref(), &case.grad_values);
    let scale = case.dropout.map_or(1.0, |dropout| f64::from(dropout.scale()));
    let epsilon = match T::DTYPE.name() {
        "float32" => U,
        "bfloat16" => 1.0 / 256.0,
        _ => 1.0 / 2048.0,
    };
    let overflows = T::DTYPE.name() == "float16" && 8.0 * scale > 65504.0;
    // All numbers are below 2 (4 as products), and a sum over rows passes at most 128 + 3 + 8 additions.
    let close = |actual: &[f32], expected: &[f64], bound: f64| {
        actual.iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() <= bound)
    };
    assert!(close(&outcome.hidden, &twin.hidden, 8.0 * scale * (epsilon + 3.0 * U)) || overflows);
    assert!(close(&outcome.weight, &twin.weight, 139.0 * U * 300.0 * 4.0 * scale));
    assert!(close(&outcome.bias, &twin.bias, U * 300.0 * 2.0));
    let shifted: Vec<f64> = twin.weight.iter().skip(1).copied().collect();
    assert!(!close(&outcome.weight, &shifted, 139.0 * U * 300.0 * 4.0 * scale) || p > 0.9);
    Ok(())
}
