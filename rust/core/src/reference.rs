//! The plain float64 twin: what the kernels should compute, written once, for tests and benchmarks.
use crate::{Dropout, Element, Head, Rows};

/// [`crate::forward`] in float64: `[N, K]`.
#[must_use]
pub fn forward<T: Element>(hidden: &Rows<'_, T>, head: &Head<'_>, dropout: Option<&Dropout>) -> Vec<f64> {
    let mut values = Vec::with_capacity(hidden.count() * head.outputs());
    for n in 0..hidden.count() {
        let row = row(hidden, n, dropout);
        let scale = dropout.map_or(1.0, |d| 65536.0 / (65536.0 - f64::from(d.threshold())));
        for k in 0..head.outputs() {
            let products = row.iter().zip(head.weight(k)).map(|(x, w)| x * f64::from(*w));
            values.push(products.fold(0.0, |a, b| a + b) * scale + f64::from(head.bias(k)));
        }
    }
    values
}

fn row<T: Element>(hidden: &Rows<'_, T>, n: usize, dropout: Option<&Dropout>) -> Vec<f64> {
    let pointer = hidden.row(n);
    let keep = |h: usize| dropout.is_none_or(|d| d.keep(n as u64, (h / 8) as u32)[h % 8]);
    // SAFETY: `h` is below the row's length.
    let read = |h: usize| f64::from(unsafe { pointer.add(h).read_unaligned() }.to_f32());
    (0..hidden.columns()).map(|h| read(h) * f64::from(u8::from(keep(h)))).collect()
}
