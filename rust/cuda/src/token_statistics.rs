//! Launches of the token statistics: `vhead_core`'s `LogitStatistics` and `LogitGradients` on tiles in device memory.
use crate::arguments::MOST_BLOCKS;
use crate::device::{Device, Geometry, Stream};
use crate::{Error, Result};
use vhead_core::{Dtype, LOGITS_BLOCK, LogitsRule};

/// Bytes of a row's state between two tiles; states lie one after the other, aligned to 8 bytes, and need not be initialised.
pub const ROW_STATE_BYTES: u64 = size_of::<RowState>() as u64;

const FOLD_THREADS: u32 = 128;
const FINISH_THREADS: u32 = 128;
const DIFFERENTIATE_THREADS: u32 = 128;
const DIFFERENTIATE_COLUMNS: u64 = 1024;
/// Most of the likeliest tokens that a row has a list for.
const MOST_TOP: u64 = 128;

/// The kernels' own structs (`kernels/token_statistics.cuh`). A row's state is theirs alone; here it has a size.
#[repr(C)]
struct RowState {
    sums: [f64; 3],
    peak: f32,
    target: f32,
    is_top1: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rule {
    inner: f32,
    outer: f32,
    kind: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tile {
    products: u64,
    bias: u64,
    row_stride: u64,
    first_column: u64,
    rows: u32,
    columns: u32,
    rule: Rule,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Selection {
    candidates: u64,
    candidate_logits: u64,
    top_tokens: u64,
    top_logits: u64,
    candidate_count: u32,
    top: u32,
}

impl Rule {
    fn new(rule: &LogitsRule, has_bias: bool) -> Self {
        let (inner, outer) = (rule.inner(), rule.outer());
        let kind = match outer {
            None if inner == 1.0 && !has_bias => 0,
            None => 1,
            Some(_) => 2,
        };
        Self { inner, outer: outer.unwrap_or(0.0), kind, unused: 0 }
    }
}

/// Products of some rows' hidden states with some tokens' weights, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceLogits {
    /// Address of the products: float32 `[rows, columns]`, whose last dimension is contiguous.
    pub products: u64,
    /// Elements from a row to the next.
    pub row_stride: u64,
    /// Rows of the tile.
    pub rows: u64,
    /// Tokens of the tile.
    pub columns: u64,
    /// The first of those tokens: a multiple of [`LOGITS_BLOCK`].
    pub first_column: u64,
    /// Address of these tokens' biases: float32 `[columns]`, contiguous; 0 without one.
    pub bias: u64,
    /// How a product becomes a logit.
    pub rule: LogitsRule,
}

impl DeviceLogits {
    fn tile(&self) -> Result<Tile> {
        if !self.first_column.is_multiple_of(LOGITS_BLOCK as u64) {
            return Err(Error::Size { what: "column", expected: "a multiple of 1024", actual: self.first_column });
        }
        Ok(Tile {
            products: self.products,
            bias: self.bias,
            row_stride: self.row_stride,
            first_column: self.first_column,
            rows: countable("rows", self.rows)?,
            columns: countable("columns", self.columns)?,
            rule: Rule::new(&self.rule, self.bias != 0),
        })
    }
}

/// Where statistics of `N` rows go: addresses of float32 `[N]` each, as `vhead_core::Statistics` names them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceStatistics {
    /// Of the targets.
    pub logprobs: u64,
    /// In nats.
    pub entropy: u64,
    /// Logarithm of the sum of squared probabilities.
    pub log_sum_p_squared: u64,
    /// 1 where the target is the first of the most probable tokens, else 0.
    pub is_top1: u64,
    /// The largest logit over temperature.
    pub peak: u64,
    /// Logarithm of the sum of exponentials relative to the peak.
    pub log_sum: u64,
}

/// What is asked for of some rows besides their targets, and what is known of it between two tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSelection {
    /// Address of the candidates: int64 `[rows, M]`.
    pub candidates: u64,
    /// Address of their logits, float32 `[rows, M]`, which need not be initialised.
    pub candidate_logits: u64,
    /// Address of the likeliest tokens: int64 `[rows, k]`, which need not be initialised.
    pub top_tokens: u64,
    /// Address of their logits, float32 `[rows, k]`, which need not be initialised.
    pub top_logits: u64,
    /// `M`.
    pub candidate_count: u64,
    /// `k`: at most 128.
    pub top: u64,
}

impl DeviceSelection {
    fn checked(&self) -> Result<Selection> {
        if self.top > MOST_TOP {
            return Err(Error::Size { what: "top", expected: "at most 128", actual: self.top });
        }
        Ok(Selection {
            candidates: self.candidates,
            candidate_logits: self.candidate_logits,
            top_tokens: self.top_tokens,
            top_logits: self.top_logits,
            candidate_count: countable("candidates", self.candidate_count)?,
            top: countable("top", self.top)?,
        })
    }
}

/// Where what was selected goes: addresses of float32 `[N, M]`, int64 `[N, k]` and float32 `[N, k]`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSelected {
    /// In the candidates' order.
    pub candidate_logprobs: u64,
    /// The likeliest first, of equals the smaller id first; -1 where the row's statistics are NaN.
    pub top_tokens: u64,
    /// Theirs.
    pub top_logprobs: u64,
}

/// What backward knows of a tile's rows: addresses of `[rows]` each, int64 targets and float32 numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRowGradients {
    /// Token ids.
    pub targets: u64,
    /// As the statistics have it.
    pub peak: u64,
    /// As the statistics have it.
    pub log_sum: u64,
    /// As the statistics have it.
    pub entropy: u64,
    /// Gradients of the log-probabilities.
    pub grad_logprobs: u64,
    /// Gradients of the entropies.
    pub grad_entropy: u64,
}

impl Device {
    /// Adds a tile to its rows' states; a row's tiles come in rising order, each once, and the one at column 0 begins anew.
    ///
    /// `targets` (int64), `states` ([`ROW_STATE_BYTES`] each) and what `selection` names are addresses of the tile's first
    /// row's. A target or candidate that is no token of the vocabulary is never met, and its log-probability is NaN in the
    /// end.
    ///
    /// # Errors
    /// [`Error::Size`] for a tile that does not start at a block or that a grid cannot cover, and for more of the likeliest
    /// tokens than a row has a list for; [`Error::Launch`] and [`Error::OutOfMemory`] from the driver.
    ///
    /// # Safety
    /// As [`Device::value_head`].
    pub unsafe fn fold_logits(
        &self,
        stream: Stream,
        tile: &DeviceLogits,
        targets: u64,
        states: u64,
        selection: Option<&DeviceSelection>,
    ) -> Result<()> {
        let tile = tile.tile()?;
        let selection = selection.map(DeviceSelection::checked).transpose()?;
        if tile.rows == 0 || tile.columns == 0 {
            return Ok(());
        }
        let geometry = Geometry { grid: [tile.rows, 1], block: [FOLD_THREADS, 1] };
        let Some(selection) = selection else {
            let arguments = [(&tile).into(), (&targets).into(), (&states).into()];
            // SAFETY: these are the arguments of `vhead_token_statistics_fold`; the caller promises what they point to.
            return unsafe { self.launch(&self.functions.fold_logits, geometry, stream, arguments) };
        };
        let arguments = [(&tile).into(), (&targets).into(), (&states).into(), (&selection).into()];
        // SAFETY: these are the arguments of `vhead_token_statistics_fold_selected`, and so on.
        unsafe { self.launch(&self.functions.fold_selected, geometry, stream, arguments) }
    }

    /// Writes what the tiles so far amount to, from `rows` states that begin at address `states`.
    ///
    /// # Errors
    /// As [`Device::fold_logits`].
    ///
    /// # Safety
    /// As [`Device::value_head`].
    pub unsafe fn finish_statistics(&self, stream: Stream, states: u64, rows: u64, to: DeviceStatistics) -> Result<()> {
        let rows = countable("rows", rows)?;
        if rows == 0 {
            return Ok(());
        }
        let geometry = Geometry { grid: [rows.div_ceil(FINISH_THREADS), 1], block: [FINISH_THREADS, 1] };
        let arguments = [(&states).into(), (&rows).into(), (&to).into()];
        // SAFETY: these are the arguments of `vhead_token_statistics_finish`; the caller promises what they point to.
        unsafe { self.launch(&self.functions.finish_statistics, geometry, stream, arguments) }
    }

    /// Writes what the tiles so far amount to for the tokens of `selection`, from `rows` states that begin at `states`.
    ///
    /// # Errors
    /// As [`Device::fold_logits`].
    ///
    /// # Safety
    /// As [`Device::value_head`].
    pub unsafe fn finish_selected(
        &self,
        stream: Stream,
        states: u64,
        rows: u64,
        selection: &DeviceSelection,
        to: DeviceSelected,
    ) -> Result<()> {
        let (rows, selection) = (countable("rows", rows)?, selection.checked()?);
        if rows == 0 {
            return Ok(());
        }
        let geometry = Geometry { grid: [rows, 1], block: [FINISH_THREADS, 1] };
        let arguments = [(&states).into(), (&selection).into(), (&to).into()];
        // SAFETY: these are the arguments of `vhead_token_statistics_finish_selected`; the caller promises the rest.
        unsafe { self.launch(&self.functions.finish_selected, geometry, stream, arguments) }
    }

    /// Writes the gradients of a tile's products to `gradients`, `[rows, columns]` contiguous in `dtype`; in float32 that may
    /// be where contiguous products are.
    ///
    /// # Errors
    /// As [`Device::fold_logits`].
    ///
    /// # Safety
    /// As [`Device::value_head`].
    pub unsafe fn differentiate_logits(
        &self,
        stream: Stream,
        tile: &DeviceLogits,
        rows: &DeviceRowGradients,
        dtype: Dtype,
        gradients: u64,
    ) -> Result<()> {
        let tile = tile.tile()?;
        if tile.rows == 0 || tile.columns == 0 {
            return Ok(());
        }
        let segments = u64::from(tile.columns).div_ceil(DIFFERENTIATE_COLUMNS);
        let blocks = countable("segments", u64::from(tile.rows) * segments)?;
        let geometry = Geometry { grid: [blocks, 1], block: [DIFFERENTIATE_THREADS, 1] };
        let arguments = [(&tile).into(), rows.into(), (&gradients).into()];
        // SAFETY: these are the arguments of `vhead_token_statistics_differentiate_*`; the caller promises what they point to.
        unsafe { self.launch(self.functions.differentiate_logits(dtype), geometry, stream, arguments) }
    }
}

/// A count that a grid's first dimension takes.
fn countable(what: &'static str, count: u64) -> Result<u32> {
    let error = Error::Size { what, expected: "at most 2^31 - 1", actual: count };
    if count > MOST_BLOCKS { Err(error) } else { u32::try_from(count).map_err(|_| error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = include_str!("../kernels/token_statistics.cuh");

    fn constant(name: &str) -> u64 {
        let start = format!("constexpr u32 {name} = ");
        let line = HEADER.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{name}"));
        line.trim_end_matches(';').parse().unwrap()
    }

    #[test]
    fn constants_are_the_kernels_own() {
        let ours = [
            ("LOGITS_BLOCK", LOGITS_BLOCK as u64),
            ("FOLD_THREADS", FOLD_THREADS.into()),
            ("FINISH_THREADS", FINISH_THREADS.into()),
            ("DIFFERENTIATE_THREADS", DIFFERENTIATE_THREADS.into()),
            ("DIFFERENTIATE_COLUMNS", DIFFERENTIATE_COLUMNS),
            ("MOST_TOP", MOST_TOP),
        ];
        for (name, value) in ours {
            assert_eq!(constant(name), value, "{name}");
        }
    }

    /// Names of a struct's fields in the kernels' source.
    fn fields(name: &str) -> Vec<&'static str> {
        let (_, body) = HEADER.split_once(&format!("struct {name} {{\n")).unwrap();
        let (body, _) = body.split_once("};").unwrap();
        let name = |line: &'static str| line.split(';').next().and_then(|field| field.trim().rsplit(' ').next());
        body.lines().filter_map(name).collect()
    }

    #[test]
    fn structs_are_laid_out_alike() {
        let tile = ["products", "bias", "row_stride", "first_column", "rows", "columns", "rule"];
        assert_eq!(fields("LogitsTile"), tile);
        assert_eq!(fields("LogitsRule"), ["inner", "outer", "kind", "unused"]);
        let statistics = ["logprobs", "entropy", "log_sum_p_squared", "is_top1", "peak", "log_sum"];
        assert_eq!(fields("TokenStatistics"), statistics);
        let rows = ["targets", "peak", "log_sum", "entropy", "grad_logprobs", "grad_entropy"];
        assert_eq!(fields("RowGradients"), rows);
        let selection = ["candidates", "candidate_logits", "top_tokens", "top_logits", "candidate_count", "top"];
        assert_eq!(fields("TokenSelection"), selection);
        assert_eq!(fields("SelectedTokens"), ["candidate_logprobs", "top_tokens", "top_logprobs"]);
        assert_eq!((size_of::<Tile>(), size_of::<RowState>(), size_of::<DeviceStatistics>()), (56, 40, 48));
        assert_eq!((size_of::<Selection>(), size_of::<DeviceSelected>()), (40, 24));
    }

    fn logits(rows: u64, columns: u64, first_column: u64, bias: u64, rule: LogitsRule) -> DeviceLogits {
        DeviceLogits { products: 64, row_stride: columns, rows, columns, first_column, bias, rule }
    }

    #[test]
    fn the_rule_has_a_kind() {
        let kind = |bias, scale, cap, temperature| {
            logits(1, 1, 0, bias, LogitsRule::new(scale, cap, temperature)).tile().unwrap().rule.kind
        };
        assert_eq!((kind(0, 1.0, None, 1.0), kind(64, 1.0, None, 1.0), kind(0, 1.0, None, 0.5)), (0, 1, 1));
        assert_eq!((kind(0, 1.0, Some(5.0), 1.0), kind(64, 2.0, Some(5.0), 1.0)), (2, 2));
    }

    #[test]
    fn a_list_has_room_for_128() {
        let asked = |candidate_count, top| {
            DeviceSelection { candidates: 0, candidate_logits: 0, top_tokens: 0, top_logits: 0, candidate_count, top }
        };
        assert_eq!(asked(5, 128).checked().map(|ours| (ours.candidate_count, ours.top)), Ok((5, 128)));
        assert_eq!(asked(5, 129).checked().unwrap_err().to_string(), "top: expected at most 128, got 129");
        assert!(asked(1 << 31, 1).checked().unwrap_err().is_argument());
    }

    #[test]
    fn tiles_start_at_blocks_and_are_countable() {
        let rule = LogitsRule::new(1.0, None, 1.0);
        assert!(logits(1, 1, 2048, 0, rule).tile().is_ok());
        let error = logits(1, 1, 1000, 0, rule).tile().unwrap_err();
        assert_eq!(error.to_string(), "column: expected a multiple of 1024, got 1000");
        assert!(logits(1 << 31, 1, 0, 0, rule).tile().unwrap_err().is_argument());
        assert!(logits(1, 1 << 31, 0, 0, rule).tile().unwrap_err().is_argument());
    }
}
