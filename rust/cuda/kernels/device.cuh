// What C++ does not say: loads past the first-level cache, conversions and shuffles. Everything else is plain C++, which a
// host compiler takes as well; in place of PTX it then calls functions of the emulation (tests/cuda/emulation/shim.hpp).
#pragma once
#include "arguments.cuh"

constexpr u32 WHOLE_WARP = 0xffffffff;

struct alignas(16) Quad {
    u32 words[4];
};

// The value of the warp's threads, which all hold the same: the compiler then keeps it in one register of the warp.
__device__ __forceinline__ u32 same_in_warp(u32 value) {
    return __reduce_or_sync(WHOLE_WARP, value);
}

__device__ __forceinline__ u64 same_in_warp(u64 value) {
    return static_cast<u64>(same_in_warp(static_cast<u32>(value >> 32))) << 32 | same_in_warp(static_cast<u32>(value));
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, u32 distance) {
    return __shfl_xor_sync(WHOLE_WARP, value, distance);
}

#ifdef __CUDA_ARCH__

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 as_bits(float value) { return __float_as_uint(value); }

// Memory that no thread writes while the kernel runs and that is read once: it does not displace the weights in the cache.
__device__ __forceinline__ Quad load_once(const Quad* from) {
    Quad quad;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(quad.words[0]), "=r"(quad.words[1]), "=r"(quad.words[2]), "=r"(quad.words[3])
                 : "l"(from));
    return quad;
}

// Memory that no thread writes while the kernel runs.
__device__ __forceinline__ float load(const float* from) { return __ldg(from); }
__device__ __forceinline__ u64 load(const u64* from) { return __ldg(from); }
__device__ __forceinline__ u32 load(const u32* from) { return __ldg(from); }
__device__ __forceinline__ u32 load(const unsigned short* from) { return __ldg(from); }

__device__ __forceinline__ Quad load(const Quad* from) {
    Quad quad;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(quad.words[0]), "=r"(quad.words[1]), "=r"(quad.words[2]), "=r"(quad.words[3])
        : "l"(from));
    return quad;
}

template <class T>
__device__ __forceinline__ void store(T* to, T value) {
    *to = value;
}

// Memory that a kernel also writes.
template <class T>
__device__ __forceinline__ T load_written(const T* from) {
    return *from;
}

__device__ __forceinline__ float float_of_float16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ u32 pack_float16(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ u32 pack_bfloat16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

#else

using emulation::as_bits;
using emulation::as_float;
using emulation::float_of_float16;
using emulation::pack_bfloat16;
using emulation::pack_float16;

__device__ __forceinline__ Quad load_once(const Quad* from) { return emulation::read(from); }

template <class T>
__device__ __forceinline__ T load(const T* from) {
    return emulation::read(from);
}

template <class T>
__device__ __forceinline__ void store(T* to, T value) {
    emulation::write(to, value);
}

template <class T>
__device__ __forceinline__ T load_written(const T* from) {
    return emulation::read(from);
}

#endif

__device__ __forceinline__ float minus_infinity() { return as_float(0xff800000); }

__device__ __forceinline__ float not_a_number() { return as_float(0x7fc00000); }
