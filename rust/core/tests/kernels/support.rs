//! Random cases and what the kernels make of them.
use vhead_core::philox::philox4x32_10;
use vhead_core::{
    Dropout, Element, Executor, Gradients, Head, Level, Result, Rows, Serial, value_head_backward_with, value_head_with,
};

/// Widths around every boundary: octet, vector, draw, tile, block.
pub(crate) const WIDTHS: [usize; 21] =
    [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 511, 896, 1000, 2048, 2049, 4097];
pub(crate) const PROBABILITIES: [f64; 4] = [0.0, 0.1, 0.5, 0.9999];

/// Number `index` of a sequence of random numbers in (-2, 2).
pub(crate) fn noise(index: usize, sequence: u64) -> f32 {
    let bits = philox4x32_10([index as u32, (index >> 32) as u32, 0, 77], sequence)[0];
    (f64::from(bits) / 2_f64.powi(30) - 2.0) as f32
}

pub(crate) fn noises(count: usize, sequence: u64) -> Vec<f32> {
    (0..count).map(|index| noise(index, sequence)).collect()
}

/// Random hidden states, weights, biases and gradients of values.
#[derive(Clone)]
pub(crate) struct Case<T> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) outputs: usize,
    pub(crate) data: Vec<T>,
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub grad_values: Vec<f32>,
    pub(crate) dropout: Option<Dropout>,
}

impl<T: Element> Case<T> {
    pub(crate) fn new(rows: usize, columns: usize, outputs: usize, p: f64) -> Result<Self> {
        Ok(Self {
            rows,
            columns,
            outputs,
            data: noises(rows * columns, 1).into_iter().map(T::from_f32).collect(),
            weight: noises(outputs * columns, 2),
            bias: noises(outputs, 3),
            grad_values: noises(rows * outputs, 4),
            dropout: Dropout::new(p, 0x1234_5678_9ABC_DEF0)?,
        })
    }

    pub(crate) fn hidden(&self) -> Result<Rows<'_, T>> {
        Rows::contiguous(&self.data, self.rows, self.columns)
    }

    pub(crate) fn head(&self) -> Result<Head<'_>> {
        Head::new(&self.weight, Some(&self.bias), self.columns)
    }

    pub(crate) fn run(&self, level: Level) -> Result<Outcome> {
        self.run_on(level, &self.hidden()?, &Serial)
    }

    pub(crate) fn run_on(&self, level: Level, hidden: &Rows<'_, T>, executor: &dyn Executor) -> Result<Outcome> {
        let head = self.head()?;
        let mut values = vec![7.0; self.rows * self.outputs];
        value_head_with(level, hidden, &head, self.dropout.as_ref(), &mut values, executor)?;
        let mut grad_hidden = vec![T::from_f32(7.0); self.rows * self.columns];
        let (mut weight, mut bias) = (vec![7.0; self.outputs * self.columns], vec![7.0; self.outputs]);
        let gradients = Gradients { hidden: Some(&mut grad_hidden), weight: Some(&mut weight), bias: Some(&mut bias) };
        value_head_backward_with(level, hidden, &head, self.dropout.as_ref(), &self.grad_values, gradients, executor)?;
        let hidden = grad_hidden.into_iter().map(T::to_f32).collect();
        Ok(Outcome { values, hidden, weight, bias })
    }
}

/// All that the kernels compute; equal where the bits are, any NaN being as good as another.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) values: Vec<f32>,
    pub(crate) hidden: Vec<f32>,
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Self) -> bool {
        same(&self.values, &other.values)
            && same(&self.hidden, &other.hidden)
            && same(&self.weight, &other.weight)
            && same(&self.bias, &other.bias)
    }
}

/// Bitwise equality, any NaN being as good as another.
pub(crate) fn same(a: &[f32], b: &[f32]) -> bool {
    let equal = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    a.len() == b.len() && a.iter().zip(b).all(equal)
}

/// Runs a test body for each dtype.
#[macro_export]
macro_rules! for_each_dtype {
    ($body:ident($($argument:expr),*)) => {{
        $body::<f32>($($argument),*)?;
        $body::<half::bf16>($($argument),*)?;
        $body::<half::f16>($($argument),*)?;
    }};
}
