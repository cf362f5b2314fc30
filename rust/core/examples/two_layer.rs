//! Speed of layers of many outputs, in GFLOP/s of processor time on one thread.
//!
//! `cargo run --release -p vhead-core --example layers [-- rounds]`
#![expect(clippy::print_stdout, reason = "a benchmark prints its table")]
use vhead_core::{Head, Linear, Result, Rows, Serial, TwoLayerHead, linear, two_layer};

const SHAPES: [[usize; 3]; 6] =
    [[1, 2048, 2048], [8, 2048, 4096], [64, 2048, 4096], [1024, 2048, 4096], [1024, 896, 896], [512, 4096, 4096]];

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).and_then(|rounds| rounds.parse().ok()).unwrap_or(5);
    println!("{:>6} {:>6} {:>6} {:>12} {:>12}", "rows", "H", "I", "two layers", "one layer");
    for [rows, columns, width] in SHAPES {
        let numbers = |count| (0..count).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect::<Vec<_>>();
        let (data, weight1, weight2) = (numbers(rows * columns), numbers(width * columns), numbers(width));
        let hidden = Rows::contiguous(&data, rows, columns)?;
        let layer = Linear::new(Rows::contiguous(&weight1, width, columns)?, None)?;
        let head = TwoLayerHead::new(layer.clone(), Head::new(&weight2, None, width)?)?;
        let (mut values, mut sums) = (vec![0.0; rows], vec![0.0; rows * width]);
        let (mut two, mut one) = (f64::MAX, f64::MAX);
        for _ in 0..rounds {
            two = two.min(timed(|| two_layer(&hidden, &head, None, &mut values, &Serial))?);
            one = one.min(timed(|| linear(&hidden, &layer, 1.0, true, &mut sums, &Serial))?);
        }
        let speed = |seconds: f64| 2e-9 * (rows * columns * width) as f64 / seconds;
        println!("{rows:6} {columns:6} {width:6} {:12.1} {:12.1}", speed(two), speed(one));
    }
    Ok(())
}

/// Seconds of this thread on a processor.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = processor_time();
    work()?;
    Ok(processor_time() - start)
}

fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is written.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
