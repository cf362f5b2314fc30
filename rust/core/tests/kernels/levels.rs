//! Every instruction set gives the bits that the documentation describes.
use crate::for_each_dtype;
use crate::model;
use crate::support::{Case, PROBABILITIES, WIDTHS, same};
use vhead_core::reduce::{LANES, OCTET, OCTETS};
use vhead_core::{CHUNK, Dropout, Element, Gradients, Level, Pool, Result, SLOTS, value_head_backward_with};

fn follows_the_model<T: Element>(rows: usize, columns: usize, outputs: usize, p: f64) -> Result<()> {
    let case = Case::<T>::new(rows, columns, outputs, p)?;
    let expected = model::outcome(&case)?;
    for level in Level::available() {
        assert!(
            case.run(level)? == expected,
            "{} {} [{rows}, {columns}] K={outputs} p={p}",
            level.name(),
            T::DTYPE.name()
        );
    }
    Ok(())
}

#[test]
fn every_width_follows_the_model() -> Result<()> {
    for columns in WIDTHS {
        for p in PROBABILITIES {
            for outputs in [1, 3] {
                for_each_dtype!(follows_the_model(3, columns, outputs, p));
            }
        }
    }
    Ok(())
}

/// More than one chunk, more chunks than slots, an odd number of rows, no rows.
#[test]
fn every_number_of_rows_follows_the_model() -> Result<()> {
    for rows in [0, 1, 2, 127, 128, 129, 1155] {
        for outputs in [1, 2] {
            for_each_dtype!(follows_the_model(rows, 33, outputs, 0.25));
        }
    }
    Ok(())
}

/// More chunks than are held at once.
#[test]
fn every_wave_follows_the_model() -> Result<()> {
    follows_the_model::<f32>(128 * 256 + 300, 2, 1, 0.0)
}

/// Gradients that are subnormal, overflow, or lie halfway between two numbers of the dtype round as in plain Rust.
#[test]
fn gradients_round_the_same_everywhere() -> Result<()> {
    for_each_dtype!(rounds_the_same());
    Ok(())
}

fn rounds_the_same<T: Element>() -> Result<()> {
    let mut case = Case::<T>::new(4, 512, 1, 0.0)?;
    case.grad_values = vec![1.0, -1.0, 1e-30, 1e30];
    for (i, weight) in case.weight.iter_mut().enumerate() {
        let exponent = [0, 1, 2, 63, 90, 97, 102, 103, 104, 110, 113, 126, 127, 128, 142, 143, 144, 254][i % 18] << 23;
        *weight = f32::from_bits(exponent | [0x8000, 0x1000, 0x18000, 0x3000, 0x7fff, 0x8001, 0x7f_ffff][i % 7]);
    }
    let expected = model::outcome(&case)?;
    assert!(expected.hidden.iter().any(|x| x.is_subnormal()) || T::DTYPE.name() == "float16");
    for level in Level::available() {
        assert!(case.run(level)? == expected, "{} {}", level.name(), T::DTYPE.name());
    }
    Ok(())
}

/// A gradient does not depend on which others are asked for.
#[test]
fn every_choice_of_gradients_is_the_same() -> Result<()> {
    for (outputs, p) in [(1, 0.0), (1, 0.1), (3, 0.0), (3, 0.1)] {
        for_each_dtype!(choice_is_the_same(outputs, p));
    }
    Ok(())
}

fn choice_is_the_same<T: Element>(outputs: usize, p: f64) -> Result<()> {
    let case = Case::<T>::new(131, 2071, outputs, p)?;
    for level in Level::available() {
        let all = case.run(level)?;
        for choice in 0..8 {
            let mut hidden = vec![T::from_f32(7.0); 131 * 2071];
            let (mut weight, mut bias) = (vec![7.0; outputs * 2071], vec![7.0; outputs]);
            let gradients = Gradients {
                hidden: (choice & 1 > 0).then_some(&mut hidden[..]),
                weight: (choice & 2 > 0).then_some(&mut weight[..]),
                bias: (choice & 4 > 0).then_some(&mut bias[..]),
            };
            let (rows, head, dropout) = (case.hidden()?, case.head()?, case.dropout.as_ref());
            value_head_backward_with(level, &rows, &head, dropout, &case.grad_values, gradients, &Pool::new(2))?;
            let hidden: Vec<f32> = hidden.into_iter().map(T::to_f32).collect();
            for (bit, actual, expected) in [(1, hidden, &all.hidden), (2, weight, &all.weight), (4, bias, &all.bias)] {
                let untouched = actual.iter().all(|x| *x == 7.0);
                assert!(if choice & bit > 0 { same(&actual, expected) } else { untouched }, "{choice} {bit}");
            }
        }
    }
    Ok(())
}

/// Negative control: another order of additions has other bits.
#[test]
fn another_order_differs() -> Result<()> {
    let case = Case::<f32>::new(64, 1000, 1, 0.0)?;
    let values = case.run(Level::best())?.values;
    let in_a_row = |row: &[f32]| row.iter().zip(&case.weight).fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
    let differs = |(row, value): (&[f32], &f32)| (in_a_row(row) + case.bias[0]).to_bits() != value.to_bits();
    assert!(case.data.chunks(1000).zip(&values).filter(|pair| differs(*pair)).count() > 32);
    Ok(())
}

/// Negative control: each of these small faults of a kernel changes the bits, in every row or nearly so.
#[test]
fn a_faulty_case_differs() -> Result<()> {
    let case = Case::<f32>::new(130, 1000, 1, 0.1)?;
    let expected = model::outcome(&case)?;
    type Fault = fn(&mut Case<f32>);
    let faults: [(&str, Fault); 4] = [
        ("last column dropped", |case| case.weight[999] = 0.0),
        ("first column of the tail dropped", |case| case.weight[768] = 0.0),
        ("two columns swapped", |case| case.weight.swap(7, 8)),
        ("another seed", |case| case.dropout = Dropout::new(0.1, 1).ok().flatten()),
    ];
    for (name, fault) in faults {
        let mut faulty = case.clone();
        fault(&mut faulty);
        let outcome = faulty.run(Level::best())?;
        assert!(outcome.values != expected.values && outcome.hidden != expected.hidden, "{name}");
    }
    Ok(())
}

/// The model of these tests takes the sizes from the crate; what they are is a promise of its own.
#[test]
fn sizes_are_the_documented_ones() {
    assert_eq!((LANES, OCTET, OCTETS), (256, 8, 32));
    assert_eq!((CHUNK, SLOTS), (128, 8));
}
