//! Linear layers by the matrix unit: `x @ weight.T + bias` of bfloat16 rows and weights.
use crate::feed_forward::{COLUMNS, write_products};
use crate::matrix_unit::{Packed, is_available};
use crate::threads::Shared;
use crate::{Error, Executor, Result, Rows};
use half::bf16;

/// The memory that layers need while they are computed; one layer after the other may use it.
#[derive(Debug, Default)]
pub struct Projection {
    rows: Packed,
    columns: Packed,
    packed: Option<(usize, usize)>,
}

impl Projection {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes `x @ weight.T + bias` of rows `[N, H]` to `to`, `[N, K]`; the weight is `[K, H]`. Products and bias are added in
    /// float32 and rounded once. With `again`, the rows are those of the call before, and are not packed a second time.
    ///
    /// # Errors
    /// [`Error::Length`] where sizes do not fit, [`Error::Level`] without the unit, [`Error::Allocation`].
    pub fn apply(
        &mut self,
        x: &Rows<'_, bf16>,
        again: bool,
        weight: &Rows<'_, bf16>,
        bias: Option<&[f32]>,
        to: &mut [bf16],
        executor: &dyn Executor,
    ) -> Result<()> {
        let (count, width) = (x.count(), weight.count());
        for (what, expected, actual) in [
            ("weight", x.columns(), weight.columns()),
            ("bias", width, bias.map_or(width, <[f32]>::len)),
            ("out", count * width, to.len()),
        ] {
            if expected != actual {
                return Err(Error::Length { what, expected, actual });
            }
        }
        if !is_available() {
            return Err(Error::Level("amx"));
        }
        if !again || self.packed != Some((count, x.columns())) {
            self.packed = None;
            self.rows.pack_rows(x, executor)?;
            self.packed = Some((count, x.columns()));
        }
        let to = Shared::new(to);
        for first in (0..width).step_by(COLUMNS) {
            let range = first..width.min(first + COLUMNS);
            self.columns.pack_columns(weight, range.clone(), executor)?;
            write_products((self.rows.lines(), count), (&self.columns, range), bias, (&to, width), executor);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pool, Serial};

    fn noise(count: usize, seed: f32) -> Vec<bf16> {
        (0..count).map(|i| bf16::from_f32((i as f32 * 12.9898 + seed).sin())).collect()
    }

    /// The layer in float64.
    fn exact(x: &[bf16], weight: &[bf16], bias: f32) -> f64 {
        x.iter().zip(weight).map(|(x, w)| x.to_f64() * w.to_f64()).fold(f64::from(bias), |a, b| a + b)
    }

    #[test]
    fn layers_are_those_of_float64() -> Result<()> {
        if !is_available() {
            return Ok(());
        }
        for (count, hidden, width) in [(1, 1, 1), (33, 80, 300), (130, 96, 257), (5, 600, 31)] {
            let (x, weight) = (noise(count * hidden, 0.3), noise(width * hidden, 1.1));
            let bias: Vec<f32> = noise(width, 2.2).into_iter().map(bf16::to_f32).collect();
            let (rows, columns) = (Rows::contiguous(&x, count, hidden)?, Rows::contiguous(&weight, width, hidden)?);
            let mut projection = Projection::new();
            let (mut to, mut again, mut plain) =
                (vec![bf16::ZERO; count * width], vec![bf16::ZERO; count * width], vec![bf16::ZERO; count * width]);
            projection.apply(&rows, false, &columns, Some(&bias), &mut to, &Pool::new(2))?;
            projection.apply(&rows, true, &columns, Some(&bias), &mut again, &Serial)?;
            projection.apply(&rows, false, &columns, None, &mut plain, &Serial)?;
            assert!(to == again);
            let (mut worst, mut without) = (0.0_f64, 0.0_f64);
            for (at, found) in to.iter().enumerate() {
                let (row, column) = (at / width, at % width);
                let exact = exact(&x[row * hidden..][..hidden], &weight[column * hidden..][..hidden], bias[column]);
                let allowed = exact.abs() / 250.0 + 1e-3;
                worst = worst.max((found.to_f64() - exact).abs() / allowed);
                without = without.max((plain[at].to_f64() - exact).abs() / allowed);
            }
            assert!(worst < 1.0 && without > 1.0, "{worst}, without bias {without}");
        }
        Ok(())
    }

    #[test]
    fn rows_of_another_size_are_packed_anew() -> Result<()> {
        if !is_available() {
            return Ok(());
        }
        let (x, weight) = (noise(64 * 40, 0.3), noise(3 * 40, 1.1));
        let columns = Rows::contiguous(&weight, 3, 40)?;
        let (mut projection, mut first, mut second) =
            (Projection::new(), vec![bf16::ZERO; 64 * 3], vec![bf16::ZERO; 9]);
        projection.apply(&Rows::contiguous(&x, 64, 40)?, false, &columns, None, &mut first, &Serial)?;
        projection.apply(&Rows::contiguous(&x[400..520], 3, 40)?, true, &columns, None, &mut second, &Serial)?;
        assert!(first[30..39] == second[..]);
        Ok(())
    }
}
