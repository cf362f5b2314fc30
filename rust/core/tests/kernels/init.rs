//! Fresh weights: their distribution, and their bits.
use vhead_core::philox::Stream;
use vhead_core::{Result, init};

const MANY: usize = 1_000_000;

fn normals(std: f32, seed: u64) -> Result<Vec<f32>> {
    let mut parameter = vec![0.0; MANY];
    init::normal(&mut parameter, std, Stream::Weight, seed)?;
    Ok(parameter)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, x| sum + x) / MANY as f64
}

/// The largest difference between the sample's distribution and `cumulative`, times the root of its size: above 1.95 in
/// one of a thousand samples (Kolmogorov, Smirnov).
fn distance(sample: &mut [f32], cumulative: impl Fn(f64) -> f64) -> f64 {
    sample.sort_by(f32::total_cmp);
    let n = sample.len() as f64;
    let gap = |(i, x): (usize, &f32)| {
        let expected = cumulative(f64::from(*x));
        ((i as f64 + 1.0) / n - expected).abs().max((expected - i as f64 / n).abs())
    };
    sample.iter().enumerate().map(gap).fold(0.0, f64::max) * n.sqrt()
}

/// Cumulative distribution of N(0, 1); error function by Abramowitz and Stegun, 7.1.26 (within 1.5e-7).
fn normal_cumulative(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs() / 2_f64.sqrt());
    let terms = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let tail = terms.iter().fold(0.0, |sum, term| (sum + term) * t) * (-x * x / 2.0).exp() / 2.0;
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[test]
fn normal_is_normal() -> Result<()> {
    let mut sample = normals(1.0, 42)?;
    let moment = |power: i32| mean(sample.iter().map(|x| f64::from(*x).powi(power)));
    let root = (MANY as f64).sqrt();
    for (power, expected, deviation) in
        [(1, 0.0, 1.0), (2, 1.0, 2_f64.sqrt()), (3, 0.0, 15_f64.sqrt()), (4, 3.0, 96_f64.sqrt())]
    {
        assert!((moment(power) - expected).abs() < 4.0 * deviation / root, "moment {power}: {}", moment(power));
    }
    let pairs = mean(sample.chunks_exact(2).map(|pair| 2.0 * f64::from(pair[0]) * f64::from(pair[1])));
    assert!(pairs.abs() < 4.0 * 2_f64.sqrt() / root);
    let distance_to_normal = distance(&mut sample, normal_cumulative);
    assert!(distance_to_normal < 1.95, "{distance_to_normal}");
    // Negative control: a deviation of 1.01 is found out.
    assert!(distance(&mut sample, |x| normal_cumulative(x / 1.01)) > 1.95);
    Ok(())
}

#[test]
fn linear_default_is_uniform() {
    let mut sample = vec![0.0; MANY];
    init::linear_default(&mut sample, 64, Stream::Weight, 42);
    assert!(sample.iter().all(|x| x.abs() <= 0.125));
    assert!(distance(&mut sample, |x| (x + 0.125) * 4.0) < 1.95);
    assert!(distance(&mut sample, |x| ((x + 0.125) * 4.0).powf(1.01)) > 1.95);
}

#[test]
fn a_number_depends_on_seed_stream_and_index_alone() -> Result<()> {
    let make = |length: usize, stream, seed| -> Result<Vec<f32>> {
        let mut parameter = vec![0.0; 2 * length];
        init::normal(&mut parameter[..length], 1.0, stream, seed)?;
        init::linear_default(&mut parameter[length..], 9, stream, seed);
        Ok(parameter)
    };
    let all = make(100, Stream::Weight, 3)?;
    for length in [1, 2, 3, 5, 99] {
        let some = make(length, Stream::Weight, 3)?;
        assert!(some[..length] == all[..length] && some[length..] == all[100..100 + length]);
    }
    assert!(make(100, Stream::Bias, 3)? != all && make(100, Stream::Weight, 4)? != all);
    assert!(make(100, Stream::Weight, 3 + (1 << 32))? != all);
    Ok(())
}

#[test]
fn a_deviation_scales_and_zero_is_zero() -> Result<()> {
    let (one, fifth) = (normals(1.0, 7)?, normals(0.2, 7)?);
    assert!(one.iter().zip(&fifth).all(|(one, fifth)| (one * 0.2 - fifth).abs() <= 1e-7 * one.abs()));
    assert!(normals(0.0, 7)?.iter().all(|x| *x == 0.0));
    Ok(())
}

/// The bits of today are those of every later release. (Worked out in Python with the C library's logarithm and cosine.)
#[test]
fn golden_values() -> Result<()> {
    let (mut normal, mut uniform) = ([0.0; 6], [0.0; 6]);
    init::normal(&mut normal, 0.2, Stream::Weight, 0x0123_4567_89AB_CDEF)?;
    init::linear_default(&mut uniform, 2048, Stream::Bias, 0x0123_4567_89AB_CDEF);
    assert_eq!(
        normal.map(f32::to_bits),
        [0x3e02_9375, 0xbb63_f6ab, 0xbd9d_80b9, 0x3d34_2bb5, 0xbe77_b64e, 0x3db1_2d02]
    );
    assert_eq!(
        uniform.map(f32::to_bits),
        [0xbc21_dc7d, 0xbbb8_751a, 0x3bc2_2e5b, 0xbad7_1deb, 0xbc7c_234f, 0x3bfa_dd29]
    );
    Ok(())
}
