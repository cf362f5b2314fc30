//! A NaN or an infinity is never hidden, dropped or not.
use crate::for_each_dtype;
use crate::model;
use crate::support::Case;
use vhead_core::{Dropout, Element, Level, Result};

/// A column of the last row that dropout keeps (or not).
fn column<T>(case: &Case<T>, kept: bool) -> Option<usize> {
    let mut mask = vec![false; case.rows * case.columns];
    case.dropout?.mask(case.columns, &mut mask).ok()?;
    mask[(case.rows - 1) * case.columns..].iter().rposition(|keep| *keep == kept)
}

#[test]
fn a_nan_in_any_column_reaches_its_row_and_no_other() -> Result<()> {
    for_each_dtype!(reaches_its_row(f32::NAN));
    for_each_dtype!(reaches_its_row(f32::INFINITY));
    Ok(())
}

fn reaches_its_row<T: Element>(bad: f32) -> Result<()> {
    for columns in [1, 17, 300] {
        for column in [0, columns / 2, columns - 1] {
            let mut case = Case::<T>::new(3, columns, 1, 0.0)?;
            case.data[columns + column] = T::from_f32(bad);
            for level in Level::available() {
                let outcome = case.run(level)?;
                let finite: Vec<bool> = outcome.values.iter().map(|x| x.is_finite()).collect();
                assert_eq!(finite, [true, false, true]);
                let spoilt = |(h, x): (usize, &f32)| x.is_finite() != (h == column);
                assert!(outcome.weight.iter().enumerate().all(spoilt) && outcome.hidden.iter().all(|x| x.is_finite()));
                assert!(outcome == model::outcome(&case)?);
            }
        }
    }
    Ok(())
}

#[test]
fn a_dropped_nan_or_infinity_gives_nan() -> Result<()> {
    for_each_dtype!(spoils_although_dropped(f32::NAN));
    for_each_dtype!(spoils_although_dropped(f32::INFINITY));
    Ok(())
}

fn spoils_although_dropped<T: Element>(bad: f32) -> Result<()> {
    let mut case = Case::<T>::new(2, 600, 1, 0.5)?;
    let column = column(&case, false).unwrap_or(usize::MAX);
    case.data[600 + column] = T::from_f32(bad);
    for level in Level::available() {
        let outcome = case.run(level)?;
        assert!(outcome.values[0].is_finite() && outcome.values[1].is_nan(), "{}", level.name());
        assert!(outcome.weight[column].is_nan() && outcome.weight.iter().filter(|x| x.is_nan()).count() == 1);
        assert!(outcome == model::outcome(&case)?);
    }
    Ok(())
}

#[test]
fn gradients_that_are_not_finite_reach_every_column() -> Result<()> {
    for_each_dtype!(spoil_the_gradient(f32::NAN, 0.5));
    for_each_dtype!(spoil_the_gradient(f32::NEG_INFINITY, 0.5));
    for_each_dtype!(spoil_the_gradient(f32::NAN, 0.0));
    // CUDA's NaN, to whose bits rounding must not carry.
    for_each_dtype!(spoil_the_gradient(f32::from_bits(0x7FFF_FFFF), 0.5));
    Ok(())
}

fn spoil_the_gradient<T: Element>(bad: f32, p: f64) -> Result<()> {
    let mut case = Case::<T>::new(5, 100, 1, p)?;
    case.grad_values[3] = bad;
    for level in Level::available() {
        let outcome = case.run(level)?;
        assert!(outcome.hidden[300..400].iter().all(|x| !x.is_finite()), "{} {}", level.name(), T::DTYPE.name());
        assert!(outcome.hidden[..300].iter().all(|x| x.is_finite()) && !outcome.bias[0].is_finite());
        assert!(outcome == model::outcome(&case)?);
    }
    Ok(())
}

/// A weight that is not finite: kept columns show it, dropped ones are zero.
#[test]
fn weights_that_are_not_finite_are_masked() -> Result<()> {
    for_each_dtype!(mask_the_weight());
    Ok(())
}

fn mask_the_weight<T: Element>() -> Result<()> {
    let mut case = Case::<T>::new(1, 100, 1, 0.5)?;
    case.dropout = Dropout::new(0.5, 4)?;
    let (kept, dropped) = (column(&case, true).unwrap_or(usize::MAX), column(&case, false).unwrap_or(usize::MAX));
    case.weight[dropped] = f32::NAN;
    for level in Level::available() {
        assert!(case.run(level)?.values[0].is_finite());
    }
    case.weight[kept] = f32::NAN;
    for level in Level::available() {
        let outcome = case.run(level)?;
        assert!(outcome.values[0].is_nan() && outcome.hidden[kept].is_nan() && outcome.hidden[dropped] == 0.0);
    }
    Ok(())
}
