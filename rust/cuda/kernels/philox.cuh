// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits as a function.
//
// The dropout mask's counter is (octet, row low, row high, 0). After two rounds its four words are
//
//   A[octet] ^ a[row high], B[octet], C[octet] ^ c[row], d[row]
//
// (rust/core/src/simd/keep.rs has it so as well). A loop over octets of several rows, or over rows of one octet, computes
// these parts once; where rows share their upper word, half of the third round is shared too.
#pragma once
#include "device.cuh"

constexpr u32 PHILOX_ROUNDS = 10;

struct Bits128 {
    u32 words[4];
};

struct Product {
    u32 high, low;
};

__device__ __forceinline__ Product multiply(u32 a, u32 b) {
    const u64 product = static_cast<u64>(a) * b;
    return {static_cast<u32>(product >> 32), static_cast<u32>(product)};
}

__device__ __forceinline__ Product multiply0(u32 word) { return multiply(0xD2511F53, word); }
__device__ __forceinline__ Product multiply1(u32 word) { return multiply(0xCD9E8D57, word); }

// The parts of an octet, of rows with the same upper word, and of a row.
struct PhiloxOctet {
    u32 a, b, c;
};
struct PhiloxUpper {
    u32 a;
};
struct PhiloxRow {
    u32 c, d;
};

// A seed's round keys, in registers of the warp.
struct Philox {
    u32 keys[PHILOX_ROUNDS][2];

    // To be made by whole warps.
    __device__ __forceinline__ explicit Philox(u64 seed) {
#pragma unroll
        for (u32 round = 0; round < PHILOX_ROUNDS; ++round) {
            keys[round][0] = same_in_warp(static_cast<u32>(seed) + round * 0x9E3779B9);
            keys[round][1] = same_in_warp(static_cast<u32>(seed >> 32) + round * 0xBB67AE85);
        }
    }

    __device__ __forceinline__ PhiloxOctet octet(u32 octet) const {
        const Product first = multiply0(octet);
        const Product second = multiply1(first.high ^ keys[0][1]);
        return {second.high, second.low, first.low};
    }

    __device__ __forceinline__ PhiloxUpper upper(u64 row) const {
        return {multiply1(static_cast<u32>(row >> 32)).low ^ keys[1][0]};
    }

    __device__ __forceinline__ PhiloxRow row(u64 row) const {
        const Product first = multiply1(static_cast<u32>(row >> 32));
        const Product second = multiply0(first.high ^ static_cast<u32>(row) ^ keys[0][0]);
        return {second.high ^ keys[1][1], second.low};
    }

    // The last eight rounds.
    __device__ __forceinline__ Bits128 draw(const PhiloxOctet& octet, const PhiloxUpper& upper, const PhiloxRow& row) const {
        u32 c0 = octet.a ^ upper.a, c1 = octet.b, c2 = octet.c ^ row.c, c3 = row.d;
#pragma unroll
        for (u32 round = 2; round < PHILOX_ROUNDS; ++round) {
            const Product product0 = multiply0(c0);
            const Product product1 = multiply1(c2);
            c0 = product1.high ^ c1 ^ keys[round][0];
            c1 = product1.low;
            c2 = product0.high ^ c3 ^ keys[round][1];
            c3 = product0.low;
        }
        return {c0, c1, c2, c3};
    }
};

__device__ __forceinline__ PhiloxUpper same_in_warp(const PhiloxUpper& state) { return {same_in_warp(state.a)}; }
__device__ __forceinline__ PhiloxRow same_in_warp(const PhiloxRow& state) {
    return {same_in_warp(state.c), same_in_warp(state.d)};
}
