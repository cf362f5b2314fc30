// Exponential function, hyperbolic tangent and logarithm, operation by operation those of rust/core/src/simd/elementary.rs
// (float32) and rust/core/src/math.rs (float64). Products and sums are not contracted: the images are compiled with
// --fmad=false, and what is one operation there is an fma here.
#pragma once
#include "device.cuh"

__device__ __forceinline__ double as_double(u64 bits) { return __builtin_bit_cast(double, bits); }

__device__ __forceinline__ u64 as_bits(double value) { return __builtin_bit_cast(u64, value); }

// Least argument of `exponential`.
constexpr float LEAST = -86.0f;

// e^x for x from LEAST to 80, or 0. The power of two is what becomes zero: a choice between two results would let the compiler
// branch around the whole of it, and threads would wait for one exponential after the other.
__device__ __forceinline__ float exponential_unless(bool is_zero, float x) {
    constexpr float MAGIC = 12582912.0f;
    const float rounded = fmaf(x, 1.44269504f, MAGIC);
    const float n = rounded - MAGIC;
    const float r = fmaf(n, 1.9046543e-9f, fmaf(n, -0.693147181f, x));
    float q = 0.00138146f;
    q = fmaf(q, r, 0.008368716f);
    q = fmaf(q, r, 0.04166839f);
    q = fmaf(q, r, 0.16666521f);
    q = fmaf(q, r, 0.49999994f);
    const float e = fmaf(q, r * r, r) + 1.0f;
    const u32 power = (as_bits(rounded) << 23) + 0x3f800000;
    return e * as_float(is_zero ? 0 : power);
}

__device__ __forceinline__ float exponential(float x) { return exponential_unless(false, x); }

__device__ __forceinline__ float hyperbolic_tangent(float x) {
    const float positive = x > 0.0f - x ? x : 0.0f - x;
    const float size = 10.0f < positive ? 10.0f : positive;
    const float square = size * size;
    float q = -0.0057049906f;
    q = fmaf(q, square, 0.02063909f);
    q = fmaf(q, square, -0.053739715f);
    q = fmaf(q, square, 0.13331442f);
    q = fmaf(q, square, -0.3333328f);
    const float small = fmaf(q, square * size, size);
    const float rest = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    const float t = size < 0.625f ? small : rest;
    return x < 0.0f ? 0.0f - t : t;
}

constexpr double LN_2 = 0.693147180559945309417232121458;

// e^x for x <= 0; 0 below -700.
__device__ __forceinline__ double exponential(double x) {
    if (x < -700.0) return 0.0;
    const double n = floor(x * 1.44269504088896340735992468100 + 0.5);
    const double r = x - n * LN_2;
    double series = 1.0;
    // A loop: where a larger logit comes is rare, and registers are dear.
#pragma unroll 1
    for (u32 k = 14; k > 0; --k) series = 1.0 + r / static_cast<double>(k) * series;
    return series * as_double(static_cast<u64>(n + 1023.0) << 52);
}

// Natural logarithm of a normal number x > 0.
__device__ __forceinline__ double logarithm(double x) {
    const u64 bits = as_bits(x);
    double exponent = static_cast<double>(static_cast<u32>(bits >> 52)) - 1023.0;
    double m = as_double((bits & 0xfffffffffffff) | 0x3ff0000000000000);
    if (m >= 1.41421356237309504880168872421) {
        exponent += 1.0;
        m /= 2.0;
    }
    const double s = (m - 1.0) / (m + 1.0);
    double series = 0.0;
#pragma unroll 1
    for (u32 k = 11; k-- > 0;) series = series * (s * s) + 1.0 / static_cast<double>(2 * k + 1);
    return exponent * LN_2 + 2.0 * s * series;
}
