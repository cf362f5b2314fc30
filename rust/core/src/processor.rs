//! What the processor is, as far as the speed of products of half precisions depends on it.

/// Its maker as the processor itself says it, like `GenuineIntel`; empty where a processor does not say.
#[must_use]
pub fn maker() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let found = std::arch::x86_64::__cpuid(0);
        let bytes = [found.ebx, found.edx, found.ecx].map(u32::to_le_bytes).concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }
    #[cfg(not(target_arch = "x86_64"))]
    String::new()
}

/// Its vector instructions for half precisions, by the names that Linux gives them.
#[must_use]
pub fn half_instructions() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if crate::Level::Avx512.is_available() {
        if is_x86_feature_detected!("avx512bf16") {
            found.push("avx512_bf16");
        }
        if is_x86_feature_detected!("avx512fp16") {
            found.push("avx512_fp16");
        }
    }
    found
}
