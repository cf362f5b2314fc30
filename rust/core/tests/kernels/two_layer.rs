//! Layers of many outputs: the documented order on every instruction set, whatever the batch, the chunks and the threads.
use crate::for_each_dtype;
use crate::model::fold;
use crate::support::{noises, same};
use half::bf16;
use vhead_core::reduce::{LANES, OCTET};
use vhead_core::{
    Dropout, Element, Error, Executor, Head, Level, Linear, Pool, Result, Rows, Serial, TwoLayerHead, apply_dropout,
    linear_with, reference, two_layer_with, value_head,
};

/// Random hidden states and a random head of two layers.
#[derive(Clone)]
struct Case<T> {
    rows: usize,
    columns: usize,
    width: usize,
    outputs: usize,
    data: Vec<T>,
    weight1: Vec<T>,
    bias1: Vec<f32>,
    weight2: Vec<f32>,
    bias2: Vec<f32>,
    dropout: Option<Dropout>,
}

impl<T: Element> Case<T> {
    fn new([rows, columns, width, outputs]: [usize; 4], p: f64) -> Result<Self> {
        let elements = |count, sequence| noises(count, sequence).into_iter().map(T::from_f32).collect();
        Ok(Self {
            rows,
            columns,
            width,
            outputs,
            data: elements(rows * columns, 11),
            weight1: elements(width * columns, 12),
            bias1: noises(width, 13),
            weight2: noises(outputs * width, 14),
            bias2: noises(outputs, 15),
            dropout: Dropout::new(p, 0x1234_5678_9ABC_DEF0)?,
        })
    }

    fn layer(&self) -> Result<Linear<'_, T>> {
        Linear::new(Rows::contiguous(&self.weight1, self.width, self.columns)?, Some(&self.bias1))
    }

    fn head(&self) -> Result<TwoLayerHead<'_, T>> {
        TwoLayerHead::new(self.layer()?, Head::new(&self.weight2, Some(&self.bias2), self.width)?)
    }

    fn hidden(&self) -> Result<Rows<'_, T>> {
        Rows::contiguous(&self.data, self.rows, self.columns)
    }

    fn values(&self, level: Level, executor: &dyn Executor) -> Result<Vec<f32>> {
        let mut values = vec![7.0; self.rows * self.outputs];
        two_layer_with(level, &self.hidden()?, &self.head()?, self.dropout.as_ref(), &mut values, executor)?;
        Ok(values)
    }

    /// Hidden states as float32, dropped ones times zero.
    fn kept(&self) -> Vec<f32> {
        let kept = |n: usize, h: usize| {
            self.dropout.is_none_or(|dropout| dropout.keep(n as u64, (h / OCTET) as u32)[h % OCTET])
        };
        let element = |(i, x): (usize, &T)| x.to_f32() * f32::from(u8::from(kept(i / self.columns, i % self.columns)));
        self.data.iter().enumerate().map(element).collect()
    }
}

/// A dot product as the documentation orders it.
fn dot(x: &[f32], weight: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    x.iter().zip(weight).enumerate().for_each(|(h, (x, w))| lanes[h % LANES] = x.mul_add(*w, lanes[h % LANES]));
    fold(&lanes)
}

fn model_of_first<T: Element>(case: &Case<T>, relu: bool) -> Vec<f32> {
    let weight1: Vec<f32> = case.weight1.iter().map(|w| w.to_f32()).collect();
    let scale = case.dropout.map_or(1.0, |dropout| dropout.scale());
    let mut sums = Vec::new();
    for x in case.kept().chunks(case.columns) {
        for (weight, bias) in weight1.chunks(case.columns).zip(&case.bias1) {
            let value = dot(x, weight).mul_add(scale, *bias);
            sums.push(if relu && value < 0.0 { 0.0 } else { value });
        }
    }
    sums
}

fn model<T: Element>(case: &Case<T>) -> Vec<f32> {
    let mut values = Vec::new();
    for activations in model_of_first(case, true).chunks(case.width) {
        let weights = case.weight2.chunks(case.width).zip(&case.bias2);
        values.extend(weights.map(|(weight, bias)| dot(activations, weight) + bias));
    }
    values
}

fn follows_the_model<T: Element>(shape: [usize; 4], p: f64) -> Result<()> {
    let case = Case::<T>::new(shape, p)?;
    let expected = model(&case);
    for level in Level::available() {
        assert!(same(&case.values(level, &Serial)?, &expected), "{} {} {shape:?} p={p}", level.name(), T::DTYPE.name());
    }
    Ok(())
}

#[test]
fn every_shape_follows_the_model() -> Result<()> {
    for columns in [1, 16, 17, 256, 300, 700] {
        for (rows, width, outputs) in [(1, 1, 1), (13, 33, 2), (25, 290, 1)] {
            for p in [0.0, 0.3] {
                for_each_dtype!(follows_the_model([rows, columns, width, outputs], p));
            }
        }
    }
    follows_the_model::<f32>([0, 5, 7, 1], 0.0)?;
    follows_the_model::<bf16>([3, 40, 1100, 16], 0.1)
}

/// More rows than are packed at once.
#[test]
fn every_chunk_follows_the_model() -> Result<()> {
    follows_the_model::<f32>([16_400, 3, 5, 1], 0.5)
}

#[test]
fn threads_change_nothing() -> Result<()> {
    let case = Case::<bf16>::new([130, 300, 600, 2], 0.1)?;
    let expected = model(&case);
    for threads in [1, 2, 5, 19] {
        assert!(same(&case.values(Level::best(), &Pool::new(threads))?, &expected), "{threads}");
    }
    Ok(())
}

#[test]
fn a_row_alone_has_the_value_it_has_in_a_batch() -> Result<()> {
    let case = Case::<f32>::new([40, 777, 513, 3], 0.0)?;
    let together = case.values(Level::best(), &Pool::new(2))?;
    for (row, expected) in case.data.chunks(777).zip(together.chunks(3)) {
        let alone = Case { rows: 1, data: row.to_vec(), ..case.clone() };
        assert!(same(&alone.values(Level::best(), &Serial)?, expected));
    }
    Ok(())
}

/// One output of a layer is the value of a head with its weights.
#[test]
fn a_layer_is_many_heads() -> Result<()> {
    let case = Case::<f32>::new([9, 1000, 70, 1], 0.0)?;
    let (mut layer, mut heads) = (vec![7.0; 9 * 70], vec![0.0; 9 * 70]);
    let head = Head::new(&case.weight1, Some(&case.bias1), 1000)?;
    value_head(&case.hidden()?, &head, None, &mut heads, &Serial)?;
    for level in Level::available() {
        linear_with(level, &case.hidden()?, &case.layer()?, 1.0, false, &mut layer, &Pool::new(3))?;
        assert!(same(&layer, &heads), "{}", level.name());
        linear_with(level, &case.hidden()?, &case.layer()?, 1.0, true, &mut layer, &Serial)?;
        assert!(same(&layer, &model_of_first(&case, true)), "{}", level.name());
    }
    assert!(!same(&layer, &heads), "a ReLU changes something");
    Ok(())
}

#[test]
fn dropped_elements_are_zero() -> Result<()> {
    let mut case = Case::<bf16>::new([50, 333, 1, 1], 0.4)?;
    case.data[333 * 7 + 5] = bf16::NAN;
    case.data[333 * 7 + 6] = bf16::INFINITY;
    let dropout = case.dropout.as_ref();
    let mut kept = vec![7.0; 50 * 333];
    apply_dropout(&case.hidden()?, dropout, 0, &mut kept, &Pool::new(2))?;
    assert!(same(&kept, &case.kept()));
    let mut rest = vec![7.0; 20 * 333];
    apply_dropout(&Rows::contiguous(&case.data[30 * 333..], 20, 333)?, dropout, 30, &mut rest, &Serial)?;
    assert!(same(&rest, &case.kept()[30 * 333..]));
    apply_dropout(&Rows::contiguous(&case.data[30 * 333..], 20, 333)?, dropout, 0, &mut rest, &Serial)?;
    assert!(!same(&rest, &case.kept()[30 * 333..]), "the row's number is part of the mask");
    Ok(())
}

/// Infinite sums do not leak from the padding of a tile; a NaN does not vanish in the ReLU.
#[test]
fn what_is_not_finite_stays_in_its_row() -> Result<()> {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut case = Case::<f32>::new([8, 40, 37, 1], 0.0)?;
        case.data[3 * 40 + 11] = bad;
        case.weight1.iter_mut().skip(11).step_by(40).for_each(|w| *w = w.abs() + 0.1);
        case.weight2.iter_mut().for_each(|w| *w = w.abs() + 0.1);
        for level in Level::available() {
            let values = case.values(level, &Serial)?;
            assert!(same(&values, &model(&case)));
            assert!(values.iter().enumerate().all(|(i, value)| value.is_finite() == (i != 3)));
            assert!(values[3].is_nan() == bad.is_nan());
        }
    }
    Ok(())
}

#[test]
fn errors_against_the_twin_are_float32_s() -> Result<()> {
    for p in [0.0, 0.3] {
        let case = Case::<bf16>::new([40, 512, 700, 2], p)?;
        let twin = reference::two_layer(&case.hidden()?, &case.head()?, case.dropout.as_ref());
        let size = twin.iter().fold(0.0, |sum, x| sum + x * x).sqrt();
        let error = |values: &[f32]| {
            let squares = values.iter().zip(&twin).map(|(a, b)| (f64::from(*a) - b).powi(2));
            squares.fold(0.0, |a, b| a + b).sqrt() / size
        };
        let values = case.values(Level::best(), &Serial)?;
        assert!(error(&values) < 3e-7, "{}", error(&values));
        let mut faulty = case.clone();
        faulty.weight1[700 * 512 - 1] = bf16::from_f32(9.0);
        assert!(error(&faulty.values(Level::best(), &Serial)?) > 3e-6, "the check can fail");
    }
    Ok(())
}

/// Negative control: each of these faults changes the bits.
#[test]
fn a_faulty_case_differs() -> Result<()> {
    let case = Case::<f32>::new([30, 900, 300, 1], 0.1)?;
    let expected = model(&case);
    type Fault = fn(&mut Case<f32>);
    let faults: [(&str, Fault); 4] = [
        ("two columns swapped", |case| case.weight1.swap(7, 8)),
        ("last weight dropped", |case| case.weight1[300 * 900 - 1] = 0.0),
        ("two outputs swapped", |case| case.weight2.swap(31, 32)),
        ("another seed", |case| case.dropout = Dropout::new(0.1, 1).ok().flatten()),
    ];
    for (name, fault) in faults {
        let mut faulty = case.clone();
        fault(&mut faulty);
        assert!(!same(&faulty.values(Level::best(), &Serial)?, &expected), "{name}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let case = Case::<f32>::new([4, 10, 6, 2], 0.0)?;
    let weight = Rows::contiguous(&case.weight1, 6, 10)?;
    let wrong = |what, expected, actual| Err(Error::Length { what, expected, actual });
    assert_eq!(Linear::new(weight.clone(), Some(&[0.0; 5])).map(|_| ()), wrong("bias", 6, 5));
    assert_eq!(Linear::new(Rows::contiguous(&case.weight1[..0], 0, 10)?, None).map(|_| ()), wrong("weight", 10, 0));
    let second = Head::new(&case.weight2, None, 4)?;
    assert_eq!(TwoLayerHead::new(case.layer()?, second).map(|_| ()), wrong("weight2", 6, 4));
    let narrow = Rows::contiguous(&case.data, 5, 8)?;
    let run = |hidden: &Rows<'_, f32>, values: &mut [f32]| {
        two_layer_with(Level::best(), hidden, &case.head()?, None, values, &Serial)
    };
    assert_eq!(run(&narrow, &mut [0.0; 10]), wrong("weight", 8, 10));
    assert_eq!(run(&case.hidden()?, &mut [0.0; 7]), wrong("values", 8, 7));
    assert_eq!(
        linear_with(Level::best(), &case.hidden()?, &case.layer()?, 1.0, true, &mut [0.0; 7], &Serial),
        wrong("outputs", 24, 7)
    );
    Ok(())
}
