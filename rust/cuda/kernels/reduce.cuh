// The one order of additions (rust/core/src/reduce.rs): lane h % 256 takes column h, eight neighbouring lanes are added as
// adjacent pairs, the 32 sums that are left are folded by halves.
//
// A warp owns a row. Its thread t holds lanes 8 * t to 8 * t + 7, so that the second step stays inside a thread and the
// third is five shuffles. Addition commutes, so the two threads that exchange sums find the same bits.
#pragma once
#include "device.cuh"

template <class Float>
__device__ __forceinline__ Float fold_octet(const Float (&lanes)[OCTET]) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// The sum of the warp's values, in every thread.
template <class Float>
__device__ __forceinline__ Float fold_halves(Float value) {
#pragma unroll
    for (u32 half = WARP / 2; half > 0; half /= 2) value += shuffle_xor(value, half);
    return value;
}

// A row's value; a bias of -0 is read as +0.
__device__ __forceinline__ float finish(float sum, float scale, float bias) {
    return fmaf(sum, scale, bias + 0.0f);
}
