//! How close the kernels come to a pass that only reads the hidden states.
//!
//! `cargo run --release -p vhead-core --example throughput [-- rows columns rounds]`
//!
//! All contestants of a table take turns, round by round, so that a noisy machine is noisy for all of them, and each starts
//! after a pass over the hidden states, so that the caches hold the same. Times are the median and the best round in
//! milliseconds; `x read` is the median of each round's ratio to the read pass of that round.
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]
use half::{bf16, f16};
use std::hint::black_box;
use std::time::Instant;
use vhead_core::{
    Dropout, Element, Executor, Gradients, Head, Level, Pool, Result, Rows, value_head, value_head_backward,
};

struct Setting {
    rows: usize,
    columns: usize,
    rounds: usize,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>().ok());
    let mut next = |default| arguments.next().flatten().unwrap_or(default);
    let setting = Setting { rows: next(8192), columns: next(2048), rounds: next(21) };
    println!("hidden [{}, {}], {}, medians of {}", setting.rows, setting.columns, Level::best().name(), setting.rounds);
    for threads in [1, 2] {
        measure::<f32>(&setting, threads)?;
        measure::<bf16>(&setting, threads)?;
        measure::<f16>(&setting, threads)?;
    }
    Ok(())
}

fn measure<T: Element>(setting: &Setting, threads: usize) -> Result<()> {
    let (rows, columns) = (setting.rows, setting.columns);
    let data: Vec<T> = (0..rows * columns).map(|i| T::from_f32(((i * 7919) % 2003) as f32 / 1000.0 - 1.0)).collect();
    let weight: Vec<f32> = (0..columns).map(|i| ((i * 31) % 97) as f32 / 97.0 - 0.5).collect();
    let grad_values: Vec<f32> = (0..rows).map(|i| ((i * 17) % 89) as f32 / 89.0 - 0.5).collect();
    let (hidden, head) = (Rows::contiguous(&data, rows, columns)?, Head::new(&weight, Some(&[0.25]), columns)?);
    let (pool, dropout) = (Pool::new(threads), Dropout::new(0.1, 7)?);
    let contestants: [(&str, &dyn Fn() -> Result<f64>); 6] = [
        ("read only", &|| Ok(timed(|| read(&data, &pool)))),
        ("forward", &|| run_forward(&hidden, &head, None, &pool)),
        ("forward, dropout", &|| run_forward(&hidden, &head, dropout.as_ref(), &pool)),
        ("backward, fresh output", &|| run_backward(&hidden, &head, None, &grad_values, &pool)),
        ("backward, dropout, fresh output", &|| run_backward(&hidden, &head, dropout.as_ref(), &grad_values, &pool)),
        ("backward, dropout, weight only", &|| run_weight_only(&hidden, &head, dropout.as_ref(), &grad_values, &pool)),
    ];
    let mut times = vec![Vec::new(); contestants.len()];
    for _ in 0..setting.rounds {
        for ((_, contestant), times) in contestants.iter().zip(&mut times) {
            black_box(read(&data, &pool));
            times.push(contestant()?);
        }
    }
    println!("\n{}, {threads} thread(s)", T::DTYPE.name());
    for ((name, _), mine) in contestants.iter().zip(&times) {
        let ratios = mine.iter().zip(&times[0]).map(|(mine, read)| mine / read).collect();
        let (middle, best) = (median(mine.clone()) * 1e3, mine.iter().copied().fold(f64::MAX, f64::min) * 1e3);
        println!("  {name:32} {middle:7.2} ms, best {best:7.2} ms, {:6.2} x read", median(ratios));
    }
    Ok(())
}

fn run_forward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    pool: &Pool,
) -> Result<f64> {
    let mut values = vec![0.0; hidden.count()];
    let start = Instant::now();
    value_head(hidden, head, dropout, &mut values, pool)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Allocation (pages that the system zeroes on first touch), page faults and release of `grad_hidden` included, as a training step has them.
fn run_backward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    pool: &Pool,
) -> Result<f64> {
    let start = Instant::now();
    let mut fresh = vec![0_u32; (hidden.count() * hidden.columns() * size_of::<T>()).div_ceil(4)];
    // SAFETY: any bits are a number.
    let grad_hidden = unsafe { fresh.align_to_mut::<T>().1 };
    let (mut grad_weight, mut grad_bias) = (vec![0.0; hidden.columns()], [0.0]);
    let gradients = Gradients { hidden: Some(grad_hidden), weight: Some(&mut grad_weight), bias: Some(&mut grad_bias) };
    value_head_backward(hidden, head, dropout, grad_values, gradients, pool)?;
    black_box(&fresh);
    Ok(start.elapsed().as_secs_f64())
}

fn run_weight_only<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    pool: &Pool,
) -> Result<f64> {
    let mut grad_weight = vec![0.0; hidden.columns()];
    let gradients = Gradients { hidden: None, weight: Some(&mut grad_weight), bias: None };
    let start = Instant::now();
    value_head_backward(hidden, head, dropout, grad_values, gradients, pool)?;
    Ok(start.elapsed().as_secs_f64())
}

fn timed(work: impl FnOnce() -> u64) -> f64 {
    let start = Instant::now();
    black_box(work());
    start.elapsed().as_secs_f64()
}

/// Reads every byte once, on the same executor.
fn read<T: Element>(data: &[T], pool: &Pool) -> u64 {
    // SAFETY: any bytes are whole words.
    let words = unsafe { data.align_to::<u64>().1 };
    let parts: Vec<&[u64]> = words.chunks(32 << 10).collect();
    let total = std::sync::atomic::AtomicU64::new(0);
    pool.run(parts.len(), &|i| {
        // SAFETY: only where the processor has AVX-512.
        let sum = if Level::best() == Level::Avx512 { unsafe { sum_avx512(parts[i]) } } else { sum(parts[i]) };
        total.fetch_add(sum, std::sync::atomic::Ordering::Relaxed);
    });
    total.into_inner()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64]) -> u64 {
    sum(words)
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn sum_avx512(words: &[u64]) -> u64 {
    sum(words)
}

#[inline(always)]
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; 32];
    for words in words.as_chunks::<32>().0 {
        lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = lane.wrapping_add(*word));
    }
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
