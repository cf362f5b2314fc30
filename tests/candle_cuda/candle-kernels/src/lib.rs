//! The names of candle-kernels that candle-core's feature `cuda` uses, with nothing behind them.
//!
//! The real crate's build script compiles some 26 CUDA sources with nvcc, for minutes. vhead calls none of them: with this in
//! its place, candle-core/cuda compiles without a toolkit, and memory, copies and vhead's own op work; candle's own
//! operations on CUDA tensors do not.

/// A module of PTX.
pub struct Module {
    index: usize,
}

impl Module {
    /// Its place among [`ALL_IDS`].
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its source: none.
    pub fn ptx(&self) -> &'static str {
        ""
    }
}

macro_rules! modules {
    ($($name:ident)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(clippy::upper_case_acronyms, non_camel_case_types)]
        pub enum Id { $($name),* }

        pub const ALL_IDS: &[Id] = &[$(Id::$name),*];

        $(pub const $name: Module = Module { index: Id::$name as usize };)*
    };
}

modules! { AFFINE BINARY CAST CONV FILL INDEXING QUANTIZED REDUCE SORT TERNARY UNARY }

/// Launchers of quantised products, which do nothing.
pub mod ffi {
    use std::ffi::c_void;

    macro_rules! launchers {
        ($arguments:tt $($name:ident)*) => {
            $(
                /// Does nothing.
                ///
                /// # Safety
                /// It reads nothing and writes nothing.
                #[allow(non_snake_case, clippy::too_many_arguments)]
                pub unsafe extern "C" fn $name $arguments {}
            )*
        };
    }

    launchers! {
        (_: *const c_void, _: *const i32, _: *mut c_void, _: i32, _: i64, _: i64, _: i64, _: i64, _: i64, _: i64, _: i64, _: i64, _: *mut c_void)
        launch_mmq_quantize_q8_1_D4 launch_mmq_quantize_q8_1_DS4 launch_mmq_quantize_q8_1_D2S6
    }
    launchers! {
        (_: *mut c_void, _: *const c_void, _: *const c_void, _: *mut c_void, _: i64, _: i64, _: i64, _: i64, _: i64, _: i32, _: i32, _: i64, _: i32, _: *mut c_void)
        launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1 launch_mmq_gguf_q5_0 launch_mmq_gguf_q5_1 launch_mmq_gguf_q8_0
        launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k launch_mmq_gguf_q4_k launch_mmq_gguf_q5_k launch_mmq_gguf_q6_k
    }
    launchers! {
        (_: *const c_void, _: *const c_void, _: *mut c_void, _: i32, _: i32, _: i32, _: i32, _: i32, _: *mut c_void)
        launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_0_f16_plain launch_mmvq_gguf_q4_0_f32_plain
        launch_mmvq_gguf_q4_1_bf16_plain launch_mmvq_gguf_q4_1_f16_plain launch_mmvq_gguf_q4_1_f32_plain
        launch_mmvq_gguf_q5_0_bf16_plain launch_mmvq_gguf_q5_0_f16_plain launch_mmvq_gguf_q5_0_f32_plain
        launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q5_1_f16_plain launch_mmvq_gguf_q5_1_f32_plain
        launch_mmvq_gguf_q8_0_bf16_plain launch_mmvq_gguf_q8_0_f16_plain launch_mmvq_gguf_q8_0_f32_plain
        launch_mmvq_gguf_q2_k_bf16_plain launch_mmvq_gguf_q2_k_f16_plain launch_mmvq_gguf_q2_k_f32_plain
        launch_mmvq_gguf_q3_k_bf16_plain launch_mmvq_gguf_q3_k_f16_plain launch_mmvq_gguf_q3_k_f32_plain
        launch_mmvq_gguf_q4_k_bf16_plain launch_mmvq_gguf_q4_k_f16_plain launch_mmvq_gguf_q4_k_f32_plain
        launch_mmvq_gguf_q5_k_bf16_plain launch_mmvq_gguf_q5_k_f16_plain launch_mmvq_gguf_q5_k_f32_plain
        launch_mmvq_gguf_q6_k_bf16_plain launch_mmvq_gguf_q6_k_f16_plain launch_mmvq_gguf_q6_k_f32_plain
    }
    launchers! {
        (_: *const c_void, _: *mut c_void, _: i32, _: i32, _: i32, _: *mut c_void)
        launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16 launch_mmvq_gguf_quantize_q8_1_f32
    }
}
