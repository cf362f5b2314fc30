//! Every instruction set gives the bits of plain Rust.
use half::{bf16, f16};
use vhead_core::*;

fn noise(i: usize, salt: u64) -> f32 {
    let bits = philox::philox4x32_10([i as u32, 0, 0, 9], salt)[0];
    (bits as f32 / 4_294_967_296.0 - 0.5) * 3.0
}

fn check<T: Element>(rows: usize, columns: usize, outputs: usize, p: f64) -> Result<()> {
    let data: Vec<T> = (0..rows * columns).map(|i| T::from_f32(noise(i, 1))).collect();
    let weight: Vec<f32> = (0..outputs * columns).map(|i| noise(i, 2)).collect();
    let bias: Vec<f32> = (0..outputs).map(|i| noise(i, 3)).collect();
    let grad_values: Vec<f32> = (0..rows * outputs).map(|i| noise(i, 4)).collect();
    let hidden = Rows::contiguous(&data, rows, columns)?;
    let head = Head::new(&weight, Some(&bias), columns)?;
    let dropout = Dropout::new(p, 99)?;
    let run = |level| -> Result<Vec<u32>> {
        let mut values = vec![0.0; rows * outputs];
        forward_with(level, &hidden, &head, dropout.as_ref(), &mut values, &Serial)?;
        let mut gh = vec![T::from_f32(7.0); rows * columns];
        let (mut gw, mut gb) = (vec![7.0; outputs * columns], vec![7.0; outputs]);
        let g = Gradients { hidden: Some(&mut gh), weight: Some(&mut gw), bias: Some(&mut gb) };
        backward_with(level, &hidden, &head, dropout.as_ref(), &grad_values, g, &Pool::new(2))?;
        let mut all: Vec<u32> = Vec::new();
        all.extend(values.iter().map(|x| x.to_bits()));
        all.extend(gw.iter().map(|x| x.to_bits()));
        all.extend(gb.iter().map(|x| x.to_bits()));
        all.extend(gh.iter().map(|x| x.to_f32().to_bits()));
        Ok(all)
    };
    let expected = run(Level::Scalar)?;
    for level in Level::available() {
        assert!(run(level)? == expected, "{level:?} {} {rows} {columns} {outputs} {p}", T::NAME);
    }
    Ok(())
}

#[test]
fn all() -> Result<()> {
    for columns in [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 511, 896, 1000, 2048, 2049, 4097] {
        for p in [0.0, 0.1, 0.5, 0.9999] {
            for outputs in [1, 3] {
                check::<f32>(5, columns, outputs, p)?;
                check::<bf16>(5, columns, outputs, p)?;
                check::<f16>(5, columns, outputs, p)?;
            }
        }
    }
    check::<bf16>(1300, 130, 1, 0.1)
}
