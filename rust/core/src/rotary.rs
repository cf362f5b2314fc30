//! Rotary position embeddings in place, rounded where torch's own operations round.
use crate::simd::rotary::Rotate;
use crate::threads::for_each_chunk;
use crate::{Element, Error, Executor, Level, Result, Rows};

/// Rows that a task takes.
const TASK_ROWS: usize = 16;

/// Replaces each head `(a, b)` of rows `[N, heads * D]` by `(a * cos - b * sin, b * cos + a * sin)`, halves of D numbers.
///
/// `cos` and `sin` are `[N, D]`, of the rows' dtype. Both products and their sum are rounded to it.
///
/// # Errors
/// [`Error::Length`] where sizes do not fit, or D is odd.
pub fn rotate<T: Element>(x: &mut [T], cos: &Rows<'_, T>, sin: &Rows<'_, T>, executor: &dyn Executor) -> Result<()> {
    let (rows, size) = (cos.count(), cos.columns());
    let columns = x.len() / rows.max(1);
    for (what, expected, actual) in [
        ("sin", rows, sin.count()),
        ("sin", size, sin.columns()),
        ("cos", size / 2 * 2, size),
        ("x", columns * rows, x.len()),
        ("heads", columns / size.max(1) * size, columns),
    ] {
        if expected != actual {
            return Err(Error::Length { what, expected, actual });
        }
    }
    for_each_chunk(executor, x, (TASK_ROWS * columns).max(1), |task, x| {
        Level::best().run(Rotate { x, cos, sin, first: task * TASK_ROWS, columns });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Serial;
    use half::{bf16, f16};

    fn noise<T: Element>(count: usize, shift: usize) -> Vec<T> {
        (0..count).map(|i| T::from_f32(((i + shift) as f32 * 12.9898).sin() * 3.0)).collect()
    }

    /// One step after the other, each rounded, as torch computes it.
    fn plain<T: Element>(x: &[T], cos: &[T], sin: &[T]) -> Vec<T> {
        let half = cos.len() / 2;
        let product = |a: f32, b: T| T::from_f32(a * b.to_f32()).to_f32();
        let turned = |i: usize| if i < half { -x[i + half].to_f32() } else { x[i - half].to_f32() };
        (0..x.len()).map(|i| T::from_f32(product(x[i].to_f32(), cos[i]) + product(turned(i), sin[i]))).collect()
    }

    fn bits<T: Element>(x: &[T]) -> Vec<u32> {
        x.iter().map(|x| x.to_f32().to_bits()).collect()
    }

    fn check<T: Element>(heads: usize, size: usize) -> Result<()> {
        let (rows, columns) = (37, heads * size);
        let (x, cos, sin): (Vec<T>, _, _) = (noise(rows * columns, 0), noise(rows * size, 5), noise(rows * size, 9));
        let expected: Vec<T> = (0..rows * heads)
            .flat_map(|i| {
                plain(&x[i * size..][..size], &cos[i / heads * size..][..size], &sin[i / heads * size..][..size])
            })
            .collect();
        let (cos, sin) = (Rows::contiguous(&cos, rows, size)?, Rows::contiguous(&sin, rows, size)?);
        let mut found = x.clone();
        rotate(&mut found, &cos, &sin, &Serial)?;
        assert_eq!(bits(&found), bits(&expected));
        assert_ne!(bits(&found), bits(&x));
        for level in Level::available() {
            let mut found = x.clone();
            level.run(Rotate { x: &mut found, cos: &cos, sin: &sin, first: 0, columns });
            assert_eq!(bits(&found), bits(&expected), "{}", level.name());
        }
        Ok(())
    }

    #[test]
    fn every_level_rounds_as_the_steps_do() -> Result<()> {
        for (heads, size) in [(1, 2), (3, 30), (14, 64), (2, 80), (5, 96), (1, 128), (2, 256)] {
            check::<f32>(heads, size)?;
            check::<bf16>(heads, size)?;
            check::<f16>(heads, size)?;
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() -> Result<()> {
        let numbers = [1.0_f32; 12];
        let of = |rows, columns| Rows::contiguous(&numbers[..rows * columns], rows, columns);
        for (x, cos, sin) in [(12, of(3, 3)?, of(3, 3)?), (12, of(3, 4)?, of(3, 2)?), (12, of(3, 4)?, of(2, 4)?)] {
            assert!(rotate(&mut vec![1.0; x], &cos, &sin, &Serial).is_err());
        }
        assert!(rotate(&mut [1.0; 11], &of(3, 4)?, &of(3, 4)?, &Serial).is_err());
        assert!(rotate(&mut [1.0; 18], &of(3, 4)?, &of(3, 4)?, &Serial).is_err());
        rotate::<f32>(&mut [], &of(0, 4)?, &of(0, 4)?, &Serial)
    }
}
