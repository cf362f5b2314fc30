// The three dtypes of hidden states, eight consecutive elements at a time.
#pragma once
#include "device.cuh"

// Eight elements as they lie in memory.
template <class Element>
struct Octet {
    static constexpr u32 WORDS = OCTET * Element::BYTES / 4;
    u32 words[WORDS];
};

// get is element `j` as float32; pack is the word that holds `values` from number `word` (twice that in half precision) on.
struct Float32 {
    typedef u32 Bits;
    static constexpr u32 BYTES = 4;

    static __device__ __forceinline__ float get(const Octet<Float32>& octet, u32 j) { return as_float(octet.words[j]); }
    static __device__ __forceinline__ u32 pack(const float (&values)[OCTET], u32 word) { return as_bits(values[word]); }
};

struct BFloat16 {
    typedef unsigned short Bits;
    static constexpr u32 BYTES = 2;

    static __device__ __forceinline__ float get(const Octet<BFloat16>& octet, u32 j) {
        const u32 word = octet.words[j / 2];
        return as_float(j % 2 ? word & 0xffff0000 : word << 16);
    }

    static __device__ __forceinline__ u32 pack(const float (&values)[OCTET], u32 word) {
        return pack_bfloat16(values[2 * word], values[2 * word + 1]);
    }
};

struct Float16 {
    typedef unsigned short Bits;
    static constexpr u32 BYTES = 2;

    static __device__ __forceinline__ float get(const Octet<Float16>& octet, u32 j) {
        const u32 word = octet.words[j / 2];
        return float_of_float16(j % 2 ? word >> 16 : word & 0xffff);
    }

    static __device__ __forceinline__ u32 pack(const float (&values)[OCTET], u32 word) {
        return pack_float16(values[2 * word], values[2 * word + 1]);
    }
};

// The octet at `from`. On the scalar path, elements from number `rest` on lie past the row's end and are +0.
template <class Element, bool VECTOR>
__device__ __forceinline__ Octet<Element> load_octet(const char* from, u32 rest) {
    Octet<Element> octet = {};
    if constexpr (VECTOR) {
#pragma unroll
        for (u32 i = 0; i < Octet<Element>::WORDS / 4; ++i) {
            const Quad quad = load_once(reinterpret_cast<const Quad*>(from) + i);
#pragma unroll
            for (u32 word = 0; word < 4; ++word) octet.words[4 * i + word] = quad.words[word];
        }
    } else {
        const typename Element::Bits* elements = reinterpret_cast<const typename Element::Bits*>(from);
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) {
            const u32 bit = 8 * Element::BYTES * j;
            if (j < rest) octet.words[bit / 32] |= static_cast<u32>(load(elements + j)) << bit % 32;
        }
    }
    return octet;
}

// Writes eight values to `to`, each rounded once. On the scalar path only the first `rest` exist.
template <class Element, bool VECTOR>
__device__ __forceinline__ void store_octet(char* to, u32 rest, const float (&values)[OCTET]) {
    if constexpr (VECTOR) {
#pragma unroll
        for (u32 i = 0; i < Octet<Element>::WORDS / 4; ++i) {
            Quad quad;
#pragma unroll
            for (u32 word = 0; word < 4; ++word) quad.words[word] = Element::pack(values, 4 * i + word);
            store(reinterpret_cast<Quad*>(to) + i, quad);
        }
    } else {
        typename Element::Bits* elements = reinterpret_cast<typename Element::Bits*>(to);
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) {
            const u32 bit = 8 * Element::BYTES * j;
            const u32 word = Element::pack(values, bit / 32);
            if (j < rest) store(elements + j, static_cast<typename Element::Bits>(word >> bit % 32));
        }
    }
}

// Eight weights. On the scalar path those from number `rest` on lie past the row's end and are +0.
template <bool VECTOR>
__device__ __forceinline__ void load_weights(const float* from, u32 rest, float (&weights)[OCTET]) {
    if constexpr (VECTOR) {
#pragma unroll
        for (u32 i = 0; i < OCTET / 4; ++i) {
            const Quad quad = load(reinterpret_cast<const Quad*>(from) + i);
#pragma unroll
            for (u32 word = 0; word < 4; ++word) weights[4 * i + word] = as_float(quad.words[word]);
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) weights[j] = j < rest ? load(from + j) : 0.0f;
    }
}
