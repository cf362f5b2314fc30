// The dropout rule of rust/core/src/dropout.rs: one Philox call an octet, 16 bits an element.
#pragma once
#include "philox.cuh"

// A launch's mask, or the lack of one.
template <bool DROPOUT>
struct Mask;

template <>
struct Mask<true> {
    typedef PhiloxOctet Octet;
    typedef PhiloxUpper Upper;
    typedef PhiloxRow Row;

    Philox philox;
    u32 threshold;  // in the upper half
    float scale;

    // To be made by whole warps.
    __device__ __forceinline__ explicit Mask(const Dropout& dropout)
        : philox(dropout.seed_address ? load(dropout.seed_address) : dropout.seed),
          threshold(dropout.threshold << 16),
          scale(dropout.scale) {}

    __device__ __forceinline__ Octet octet(u32 octet) const { return philox.octet(octet); }
    __device__ __forceinline__ Upper upper(u64 row) const { return philox.upper(row); }
    __device__ __forceinline__ Row row(u64 row) const { return philox.row(row); }

    __device__ __forceinline__ Bits128 draw(const Octet& octet, const Upper& upper, const Row& row) const {
        return philox.draw(octet, upper, row);
    }

    // `value` where element `j` of the octet is kept, +0 where it is dropped.
    __device__ __forceinline__ float keep(const Bits128& bits, u32 j, float value) const {
        const u32 word = bits.words[j / 2];
        return (j % 2 ? word : word << 16) >= threshold ? value : 0.0f;
    }
};

template <>
struct Mask<false> {
    struct Octet {};
    struct Upper {};
    struct Row {};
    static constexpr float scale = 1.0f;

    __device__ __forceinline__ explicit Mask(const Dropout&) {}
    __device__ __forceinline__ Octet octet(u32) const { return {}; }
    __device__ __forceinline__ Upper upper(u64) const { return {}; }
    __device__ __forceinline__ Row row(u64) const { return {}; }
    __device__ __forceinline__ Bits128 draw(const Octet&, const Upper&, const Row&) const { return {}; }
    __device__ __forceinline__ float keep(const Bits128&, u32, float value) const { return value; }
};

__device__ __forceinline__ Mask<false>::Upper same_in_warp(const Mask<false>::Upper& upper) { return upper; }
__device__ __forceinline__ Mask<false>::Row same_in_warp(const Mask<false>::Row& row) { return row; }
