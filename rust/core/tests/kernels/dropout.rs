//! The mask: its rate, what it is a function of, and that the kernels use the one that [`Dropout::mask`] shows.
use crate::for_each_dtype;
use crate::support::{Case, noises};
use vhead_core::{Dropout, Element, Head, Level, Pool, Result, Rows, value_head};

fn mask(seed: u64, p: f64, rows: usize, columns: usize) -> Result<Vec<bool>> {
    let mut mask = vec![true; rows * columns];
    if let Some(dropout) = Dropout::new(p, seed)? {
        dropout.mask(columns, &mut mask)?;
    }
    Ok(mask)
}

fn rate(mask: &[bool]) -> f64 {
    mask.iter().filter(|keep| **keep).count() as f64 / mask.len() as f64
}

#[test]
fn the_keep_rate_is_binomial() -> Result<()> {
    for p in [0.001, 0.1, 0.5, 0.9, 0.9999] {
        for seed in [0, 1, u64::MAX] {
            let mask = mask(seed, p, 1000, 1000)?;
            let threshold = f64::from(Dropout::new(p, seed)?.map_or(0, |dropout| dropout.threshold()));
            let expected = 1.0 - threshold / 65536.0;
            let deviation = (expected * (1.0 - expected) / 1e6).sqrt();
            assert!((rate(&mask) - expected).abs() < 5.0 * deviation, "{p} {seed} {}", rate(&mask));
            assert!((expected - (1.0 - p)).abs() <= 0.5 / 65536.0 + 1e-12);
        }
    }
    Ok(())
}

/// Any two masks (another seed, the next row, the next column, the next octet) agree as often as independent ones do.
#[test]
fn masks_are_independent() -> Result<()> {
    let (rows, columns) = (500, 1024);
    let first = mask(5, 0.5, rows, columns)?;
    let agreement = |a: &[bool], b: &[bool]| {
        let equal = a.iter().zip(b).filter(|(a, b)| a == b).count();
        (equal as f64 / a.len().min(b.len()) as f64 - 0.5).abs() * 2.0 * (a.len().min(b.len()) as f64).sqrt()
    };
    assert!(agreement(&first, &mask(6, 0.5, rows, columns)?) < 5.0);
    assert!(agreement(&first, &mask(5 + (1 << 32), 0.5, rows, columns)?) < 5.0);
    for shift in [1, 8, 16, columns] {
        assert!(agreement(&first[..first.len() - shift], &first[shift..]) < 5.0, "{shift}");
    }
    assert!(agreement(&first, &mask(5, 0.5, rows, columns)?) > 100.0);
    Ok(())
}

/// A row's mask does not depend on how many columns are asked for.
#[test]
fn a_narrow_mask_is_the_start_of_a_wide_one() -> Result<()> {
    let (narrow, wide) = (mask(9, 0.3, 20, 77)?, mask(9, 0.3, 20, 2050)?);
    assert!(narrow.chunks(77).zip(wide.chunks(2050)).all(|(narrow, wide)| *narrow == wide[..77]));
    Ok(())
}

/// One-hot hidden states make the kernels tell their mask, in all columns, and rows beyond the 32nd bit are drawn too.
#[test]
fn kernels_use_this_mask() -> Result<()> {
    for_each_dtype!(kernels_use_the_mask());
    Ok(())
}

fn kernels_use_the_mask<T: Element>() -> Result<()> {
    let columns = 700;
    let case = Case::<T>::new(40, columns, 1, 0.4)?;
    let expected = mask(0x1234_5678_9ABC_DEF0, 0.4, 40, columns)?;
    for level in Level::available() {
        let outcome = case.run(level)?;
        let differs = |shift: usize| {
            let kept = expected[shift..].iter().chain(&expected[..shift]);
            outcome.hidden.iter().zip(kept).filter(|(gradient, keep)| (**gradient != 0.0) != **keep).count()
        };
        assert_eq!(differs(0), 0, "{}", level.name());
        // Negative control: the masks of the next column or row are not it.
        assert!(differs(1) > 1000 && differs(columns) > 1000);
    }
    Ok(())
}

/// The same value with the mask applied to the hidden states beforehand: exactly, since dropped products are zeros.
#[test]
fn dropping_before_or_inside_is_the_same() -> Result<()> {
    let mut case = Case::<f32>::new(50, 1000, 1, 0.1)?;
    let inside = case.run(Level::best())?.values;
    let keep = mask(0x1234_5678_9ABC_DEF0, 0.1, 50, 1000)?;
    case.data.iter_mut().zip(&keep).for_each(|(x, keep)| *x *= f32::from(u8::from(*keep)));
    let head = Head::new(&case.weight, None, 1000)?;
    let mut sums = vec![0.0; 50];
    value_head(&case.hidden()?, &head, None, &mut sums, &Pool::new(2))?;
    let scale = case.dropout.map_or(0.0, |dropout| dropout.scale());
    for (inside, sum) in inside.iter().zip(&sums) {
        assert_eq!(inside.to_bits(), sum.mul_add(scale, case.bias[0]).to_bits());
    }
    Ok(())
}

#[test]
fn the_scale_keeps_the_mean() -> Result<()> {
    let (data, weight) = (noises(2048, 1), noises(2048, 2));
    let repeated: Vec<f32> = std::iter::repeat_n(&data, 4000).flatten().copied().collect();
    let head = Head::new(&weight, None, 2048)?;
    let (mut exact, mut dropped) = ([0.0], vec![0.0; 4000]);
    value_head(&Rows::contiguous(&data, 1, 2048)?, &head, None, &mut exact, &Pool::new(1))?;
    let dropout = Dropout::new(0.3, 11)?;
    value_head(&Rows::contiguous(&repeated, 4000, 2048)?, &head, dropout.as_ref(), &mut dropped, &Pool::new(2))?;
    let mean = dropped.iter().fold(0.0, |sum, x| sum + f64::from(*x)) / 4000.0;
    let square = data.iter().zip(&weight).fold(0.0, |sum, (x, w)| sum + f64::from(x * w).powi(2));
    let deviation = (square * 0.3 / 0.7 / 4000.0).sqrt();
    assert!((mean - f64::from(exact[0])).abs() < 4.0 * deviation);
    Ok(())
}

#[test]
fn probabilities_that_round_to_zero_are_no_dropout() -> Result<()> {
    assert!(Dropout::new(0.0, 1)?.is_none() && Dropout::new(1e-6, 1)?.is_none() && Dropout::new(1e-5, 1)?.is_some());
    let nearly_one = Dropout::new(1.0 - 1e-9, 1)?;
    assert_eq!(nearly_one.map(|dropout| (dropout.threshold(), dropout.scale())), Some((65535, 65536.0)));
    Ok(())
}
