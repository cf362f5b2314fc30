//! What a launch passes to a kernel, and the constants of its geometry: `kernels/arguments.cuh` once more.
//!
//! The tests read that file and compare.
use crate::{Error, Result};
use vhead_core::Dropout;

/// Rows whose weight gradients one block adds.
pub(crate) const CHUNK: u64 = vhead_core::CHUNK as u64;
/// Slots that chunks are dealt to.
pub(crate) const SLOTS: u32 = vhead_core::SLOTS as u32;
/// Partial sums of a row.
pub(crate) const LANES: u32 = vhead_core::reduce::LANES as u32;
/// Columns that one thread takes at a time.
pub(crate) const OCTET: u32 = vhead_core::reduce::OCTET as u32;
pub(crate) const WARP: u32 = 32;
pub(crate) const FORWARD_WARPS: u32 = 2;
/// Rows that a warp takes where it takes several, times the size of an element.
pub(crate) const FORWARD_ROW_BYTES: u64 = 8;
pub(crate) const FORWARD_MANY_ROWS: u64 = 8192;
pub(crate) const BACKWARD_THREADS: u32 = 64;
pub(crate) const ADD_CHUNKS_COLUMNS: u32 = 32;
pub(crate) const MOST_DIMENSIONS: usize = 4;
/// Blocks that a grid may have in its first dimension.
pub(crate) const MOST_BLOCKS: u64 = i32::MAX as u64;

/// A head's parameters in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceHead {
    /// Address of the weight: float32 `[K, H]`, contiguous.
    pub weight: u64,
    /// Address of the bias: float32 `[K]`, contiguous; 0 without one. Backward does not read it.
    pub bias: u64,
    /// Numbers per row: `K`.
    pub outputs: u32,
}

impl DeviceHead {
    /// A head has at least one output, and no more than a grid has blocks.
    pub(crate) fn check(&self) -> Result<()> {
        if (1..=MOST_BLOCKS).contains(&self.outputs.into()) {
            return Ok(());
        }
        Err(Error::Size { what: "outputs", expected: "1 to 2^31 - 1", actual: self.outputs.into() })
    }
}

/// Where a mask's seed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seed {
    /// Here: a captured graph draws the same mask at each replay.
    Value(u64),
    /// At this address of device memory, where the kernel reads 8 bytes.
    Address(u64),
}

/// A dropout mask whose seed may be in device memory; the rule is `vhead_core`'s.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceDropout {
    seed_address: u64,
    seed: u64,
    threshold: u32,
    scale: f32,
}

impl DeviceDropout {
    /// Stands where a kernel without dropout reads nothing.
    pub(crate) const NONE: Self = Self { seed_address: 0, seed: 0, threshold: 0, scale: 1.0 };

    /// The rule for probability `p`; `None` where `p` rounds to no dropout.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `0 <= p < 1`.
    pub fn new(p: f64, seed: Seed) -> Result<Option<Self>> {
        let (seed_address, seed) = match seed {
            Seed::Value(seed) => (0, seed),
            Seed::Address(address) => (address, 0),
        };
        let rule = Dropout::new(p, seed).map_err(|_| Error::Probability(p.to_string()))?;
        Ok(rule.map(|rule| Self { seed_address, seed, threshold: rule.threshold().into(), scale: rule.scale() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Rows;

    const HEADER: &str = include_str!("../kernels/arguments.cuh");

    fn constant(name: &str) -> u64 {
        let start = format!("constexpr u32 {name} = ");
        let line = HEADER.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{name}"));
        line.split_once(';').unwrap().0.parse().unwrap()
    }

    #[test]
    fn constants_are_the_kernels_own() {
        let ours = [
            ("CHUNK", CHUNK),
            ("SLOTS", SLOTS.into()),
            ("LANES", LANES.into()),
            ("OCTET", OCTET.into()),
            ("WARP", WARP.into()),
            ("FORWARD_WARPS", FORWARD_WARPS.into()),
            ("FORWARD_ROW_BYTES", FORWARD_ROW_BYTES),
            ("FORWARD_MANY_ROWS", FORWARD_MANY_ROWS),
            ("BACKWARD_THREADS", BACKWARD_THREADS.into()),
            ("ADD_CHUNKS_COLUMNS", ADD_CHUNKS_COLUMNS.into()),
            ("MOST_DIMENSIONS", MOST_DIMENSIONS as u64),
        ];
        for (name, value) in ours {
            assert_eq!(constant(name), value, "{name}");
        }
    }

    /// Types of a struct's fields in the kernels' source.
    fn fields(name: &str) -> Vec<&'static str> {
        let (_, body) = HEADER.split_once(&format!("struct {name} {{\n")).unwrap();
        let (body, _) = body.split_once("};").unwrap();
        body.lines().map(str::trim).collect()
    }

    #[test]
    fn structs_are_laid_out_alike() {
        assert_eq!(
            fields("Rows"),
            [
                "const void* data;",
                "u64 count;",
                "u32 columns;",
                "u32 dimensions;",
                "u64 sizes[MOST_DIMENSIONS];",
                "i64 strides[MOST_DIMENSIONS];"
            ]
        );
        assert_eq!(fields("Dropout"), ["const u64* seed_address;", "u64 seed;", "u32 threshold;", "float scale;"]);
        assert_eq!((size_of::<Rows>(), size_of::<DeviceDropout>()), (88, 24));
    }

    #[test]
    fn outputs_must_be_countable() {
        let check = |outputs| DeviceHead { weight: 0, bias: 0, outputs }.check();
        assert!(check(0).is_err());
        assert!(check(1 << 31).is_err());
        assert_eq!(check(1), Ok(()));
    }

    #[test]
    fn the_rule_is_the_core_s() {
        let core = Dropout::new(0.1, 7).unwrap().unwrap();
        let ours = DeviceDropout::new(0.1, Seed::Value(7)).unwrap().unwrap();
        assert_eq!((ours.threshold, ours.scale), (core.threshold().into(), core.scale()));
        assert_eq!((ours.seed_address, ours.seed), (0, 7));
        let on_device = DeviceDropout::new(0.1, Seed::Address(64)).unwrap().unwrap();
        assert_eq!((on_device.seed_address, on_device.threshold), (64, ours.threshold));
        assert_eq!(DeviceDropout::new(0.0, Seed::Value(7)), Ok(None));
        assert!(DeviceDropout::new(1.0, Seed::Value(7)).unwrap_err().is_argument());
    }
}
