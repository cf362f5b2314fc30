//! Every error, with its text; nothing is written when one is returned.
use crate::support::Case;
use vhead_core::philox::Stream;
use vhead_core::{
    Dropout, Error, Gradients, Head, Level, Result, Rows, Serial, init, value_head, value_head_backward,
    value_head_backward_with, value_head_with,
};

fn text<T>(result: Result<T>) -> String {
    result.err().map_or_else(String::new, |error| error.to_string())
}

#[test]
fn hidden_states_of_the_wrong_length() {
    assert_eq!(text(Rows::contiguous(&[1.0_f32; 7], 2, 4)), "hidden: expected 8 elements, got 7");
    assert!(Rows::contiguous(&[1.0_f32; 7], usize::MAX, 2).is_err());
}

#[test]
fn rows_outside_the_buffer() {
    let data = [1.0_f32; 10];
    let expected = "hidden: sizes [2] with strides [6] do not fit a buffer of 10 elements";
    assert_eq!(text(Rows::strided(&data, 0, &[2], &[6], 5)), expected);
    assert!(Rows::strided(&data, 0, &[2], &[5], 5).is_ok());
    assert!(Rows::strided(&data, 5, &[2], &[-5], 5).is_ok() && Rows::strided(&data, 4, &[2], &[-5], 5).is_err());
    assert!(Rows::strided(&data, 1, &[2], &[5], 5).is_err() && Rows::strided(&data, 0, &[2, 1], &[5], 5).is_err());
    assert!(Rows::strided(&data, 0, &[usize::MAX, 2], &[0, 0], 1).is_err());
    assert!(Rows::strided(&data, 0, &[usize::MAX], &[isize::MAX], 1).is_err());
    assert!(Rows::strided(&data, 0, &[0], &[isize::MAX], 1).is_ok_and(|rows| rows.count() == 0));
}

#[test]
fn heads_that_do_not_fit() {
    assert_eq!(text(Head::new(&[1.0; 7], None, 4)), "weight: expected 4 elements, got 7");
    assert_eq!(text(Head::new(&[1.0; 8], Some(&[1.0]), 4)), "bias: expected 2 elements, got 1");
    assert!(Head::new(&[1.0; 8], None, 0).is_err() && Head::new(&[], None, 0).is_err());
    assert!(Head::new(&[], None, 4).is_err());
}

#[test]
fn outputs_of_the_wrong_length() -> Result<()> {
    let case = Case::<f32>::new(3, 20, 2, 0.0)?;
    let (hidden, head, mut values) = (case.hidden()?, case.head()?, [7.0; 5]);
    let result = value_head(&hidden, &head, None, &mut values, &Serial);
    assert_eq!(text(result), "values: expected 6 elements, got 5");
    let narrow = Head::new(&case.weight[..38], None, 19)?;
    assert_eq!(text(value_head(&hidden, &narrow, None, &mut values, &Serial)), "weight: expected 20 elements, got 19");
    assert!(values == [7.0; 5]);
    Ok(())
}

#[test]
fn gradients_of_the_wrong_length() -> Result<()> {
    let case = Case::<f32>::new(3, 20, 2, 0.0)?;
    for (wrong, expected) in [
        ([6, 59, 40, 2], "grad_hidden: expected 60 elements, got 59"),
        ([6, 60, 41, 2], "grad_weight: expected 40 elements, got 41"),
        ([6, 60, 40, 1], "grad_bias: expected 2 elements, got 1"),
        ([5, 60, 40, 2], "grad_values: expected 6 elements, got 5"),
    ] {
        let [mut grad, mut hidden, mut weight, mut bias] = wrong.map(|length| vec![7.0; length]);
        grad.fill(1.0);
        let gradients = Gradients { hidden: Some(&mut hidden), weight: Some(&mut weight), bias: Some(&mut bias) };
        let result = value_head_backward(&case.hidden()?, &case.head()?, None, &grad, gradients, &Serial);
        assert_eq!(text(result), expected);
        assert!([hidden, weight, bias].concat().iter().all(|x| *x == 7.0));
    }
    Ok(())
}

#[test]
fn probabilities_and_deviations_out_of_range() {
    assert_eq!(text(Dropout::new(1.0, 0)), "dropout probability must lie in [0, 1), got 1");
    for p in [-0.1, -f64::MIN_POSITIVE, f64::NAN, f64::INFINITY] {
        assert!(Dropout::new(p, 0).is_err());
    }
    for std in [-1.0, f32::NAN, f32::INFINITY] {
        let mut parameter = [7.0];
        let result = init::normal(&mut parameter, std, Stream::Weight, 0);
        assert_eq!(text(result), format!("standard deviation must be finite and not negative, got {std}"));
        assert!(parameter == [7.0]);
    }
}

#[test]
fn masks_of_the_wrong_length() -> Result<()> {
    let dropout = Dropout::new(0.5, 0)?;
    let result = dropout.map(|dropout| dropout.mask(4, &mut [true; 7]));
    assert_eq!(result.map(text), Some("mask: expected 4 elements, got 7".into()));
    Ok(())
}

#[test]
fn instruction_sets_of_other_processors() -> Result<()> {
    let case = Case::<f32>::new(1, 20, 1, 0.0)?;
    for level in [Level::Scalar, Level::Avx2, Level::Avx512, Level::Neon] {
        let available = Level::available().contains(&level);
        let mut values = [7.0];
        let result = value_head_with(level, &case.hidden()?, &case.head()?, None, &mut values, &Serial);
        assert_eq!(result.is_ok(), available);
        assert_eq!(values == [7.0], !available);
        let none = Gradients { hidden: None, weight: None, bias: None };
        let result = value_head_backward_with(level, &case.hidden()?, &case.head()?, None, &[1.0], none, &Serial);
        assert_eq!(result.err(), (!available).then(|| Error::Level(level.name())));
    }
    assert!(Level::available().contains(&Level::Scalar) && Level::available().contains(&Level::best()));
    let missing = Error::Level("neon").to_string();
    assert_eq!(missing, "instruction set neon is not available on this processor");
    Ok(())
}
