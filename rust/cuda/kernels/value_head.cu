// value[n, k] = bias[k] + scale * sum_h keep(n, h) * hidden[n, h] * weight[k, h]
//
// A warp takes ROWS rows and OUTPUTS outputs at a time. Either several rows of a head with one output, so that a weight is
// loaded and the columns' part of Philox is computed once for all of them; or one row and up to four outputs, so that the
// hidden states are read once. More than four outputs read them again for each further four.
//
// Each thread has 64 bytes of hidden states under way: as soon as an octet has been added, its registers are sent for the
// row's next one, or with one row for the fourth next. No barrier and no shared memory comes between.
#include "dropout.cuh"
#include "elements.cuh"
#include "reduce.cuh"
#include "rows.cuh"

constexpr u32 FORWARD_OUTPUTS = 4;

template <class Element, bool VECTOR, bool DROPOUT, u32 ROWS, u32 OUTPUTS>
struct Projection {
    typedef Mask<DROPOUT> MaskOf;
    // Octets of a row that are under way.
    static constexpr u32 AHEAD = VECTOR ? FORWARD_ROW_BYTES / Element::BYTES / ROWS : 1;

    const MaskOf& mask;
    const float* weight;
    u32 columns;
    u32 octets;
    u32 outputs;  // at most OUTPUTS
    typename MaskOf::Upper upper;
    typename MaskOf::Row row_masks[ROWS];
    const char* rows[ROWS];
    Octet<Element> hidden[AHEAD][ROWS];
    float lanes[ROWS][OUTPUTS][OCTET];

    // `first` is a multiple of ROWS; rows past the last are the last.
    __device__ __forceinline__ Projection(const MaskOf& mask, const Rows& from, u64 first, const float* weight, u32 outputs)
        : mask(mask),
          weight(weight),
          columns(from.columns),
          octets((from.columns + OCTET - 1) / OCTET),
          outputs(outputs),
          upper(same_in_warp(mask.upper(first))),
          lanes() {
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const u64 row = first + i < from.count ? first + i : from.count - 1;
            row_masks[i] = same_in_warp(mask.row(row));
            rows[i] = reinterpret_cast<const char*>(same_in_warp(reinterpret_cast<u64>(row_start<Element>(from, row))));
        }
    }

    // Steps 1 and 2 of the order of additions, for the octets of one thread.
    __device__ __forceinline__ void run() {
        u32 octet = threadIdx.x % WARP;
#pragma unroll
        for (u32 tile = 0; tile < AHEAD; ++tile) {
            if (octet + tile * WARP < octets) fetch_rows(octet + tile * WARP, tile);
        }
        if constexpr (AHEAD == 1) {
            for (; octet + WARP < octets; octet += WARP) add_octet(octet, 0, true);
            if (octet < octets) add_octet(octet, 0, false);
        } else {
            for (; octet < octets; octet += AHEAD * WARP) {
#pragma unroll
                for (u32 tile = 0; tile < AHEAD; ++tile) {
                    const u32 current = octet + tile * WARP;
                    if (current < octets) add_octet(current, tile, current + AHEAD * WARP < octets);
                }
            }
        }
    }

    __device__ __forceinline__ void fetch(u32 octet, u32 tile, u32 i) {
        hidden[tile][i] = load_octet<Element, VECTOR>(rows[i] + octet * (OCTET * Element::BYTES), columns - octet * OCTET);
    }

    __device__ __forceinline__ void fetch_rows(u32 octet, u32 tile) {
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) fetch(octet, tile, i);
    }

    // Adds an octet of each row to the lanes, and sends for more.
    __device__ __forceinline__ void add_octet(u32 octet, u32 tile, bool more) {
        float weights[OUTPUTS][OCTET];
#pragma unroll
        for (u32 output = 0; output < OUTPUTS; ++output) {
            if (output < outputs) {
                const float* from = weight + static_cast<u64>(output) * columns + octet * OCTET;
                load_weights<VECTOR>(from, columns - octet * OCTET, weights[output]);
            }
        }
        const typename MaskOf::Octet octet_mask = mask.octet(octet);
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const Bits128 bits = mask.draw(octet_mask, upper, row_masks[i]);
#pragma unroll
            for (u32 output = 0; output < OUTPUTS; ++output) {
                if (output < outputs) add(bits, hidden[tile][i], weights[output], lanes[i][output]);
            }
            if (more) fetch(octet + AHEAD * WARP, tile, i);
        }
    }

    __device__ __forceinline__ void add(const Bits128& bits, const Octet<Element>& hidden, const float (&weights)[OCTET],
                                        float (&sums)[OCTET]) {
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) {
            sums[j] = fmaf(Element::get(hidden, j), mask.keep(bits, j, weights[j]), sums[j]);
        }
    }

    // Step 3 for one row and output.
    __device__ __forceinline__ float value(u32 i, u32 output, const float* bias) const {
        return finish(fold_halves(fold_octet(lanes[i][output])), mask.scale, bias ? load(bias + output) : 0.0f);
    }
};

// The warp's number in the grid, and how many there are.
__device__ __forceinline__ u64 warp_in_grid() {
    return static_cast<u64>(blockIdx.x) * FORWARD_WARPS + same_in_warp(threadIdx.x / WARP);
}
__device__ __forceinline__ u64 warps_in_grid() { return static_cast<u64>(gridDim.x) * FORWARD_WARPS; }

template <class Element, bool VECTOR, bool DROPOUT>
__device__ __forceinline__ void forward(const Rows& hidden, const float* weight, const float* bias, u32 outputs,
                                        const Dropout& dropout, float* values) {
    const Mask<DROPOUT> mask(dropout);
    for (u64 row = warp_in_grid(); row < hidden.count; row += warps_in_grid()) {
        for (u32 first = 0; first < outputs; first += FORWARD_OUTPUTS) {
            const u32 rest = outputs - first < FORWARD_OUTPUTS ? outputs - first : FORWARD_OUTPUTS;
            const float* weights = weight + static_cast<u64>(first) * hidden.columns;
            Projection<Element, VECTOR, DROPOUT, 1, FORWARD_OUTPUTS> projection(mask, hidden, row, weights, rest);
            projection.run();
#pragma unroll
            for (u32 output = 0; output < FORWARD_OUTPUTS; ++output) {
                if (output < rest) {
                    const float value = projection.value(0, output, bias ? bias + first : nullptr);
                    if (threadIdx.x % WARP == 0) store(values + row * outputs + first + output, value);
                }
            }
        }
    }
}

template <class Element, bool DROPOUT>
__device__ __forceinline__ void forward_rows(const Rows& hidden, const float* weight, const float* bias,
                                             const Dropout& dropout, float* values) {
    constexpr u32 ROWS = FORWARD_ROW_BYTES / Element::BYTES;
    const Mask<DROPOUT> mask(dropout);
    for (u64 first = warp_in_grid() * ROWS; first < hidden.count; first += warps_in_grid() * ROWS) {
        Projection<Element, true, DROPOUT, ROWS, 1> projection(mask, hidden, first, weight, 1);
        projection.run();
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const float value = projection.value(i, 0, bias);
            if (threadIdx.x % WARP == 0 && first + i < hidden.count) store(values + first + i, value);
        }
    }
}

// The second bound, how many blocks a multiprocessor should hold, limits the registers. Ten blocks leave 96 of them, and have
// 40 KiB of hidden states under way.
#define FORWARD(NAME, ELEMENT, VECTOR, DROPOUT)                                                                            \
    extern "C" __global__ void __launch_bounds__(WARP * FORWARD_WARPS, VECTOR ? 8 : 6)                                     \
        NAME(const __grid_constant__ Rows hidden, const float* weight, const float* bias, u32 outputs,                     \
             const __grid_constant__ Dropout dropout, float* values) {                                                     \
        forward<ELEMENT, VECTOR, DROPOUT>(hidden, weight, bias, outputs, dropout, values);                                 \
    }

#define FORWARD_ROWS(NAME, ELEMENT, DROPOUT)                                                                               \
    extern "C" __global__ void __launch_bounds__(WARP * FORWARD_WARPS, 10)                                                 \
        NAME(const __grid_constant__ Rows hidden, const float* weight, const float* bias, u32,                             \
             const __grid_constant__ Dropout dropout, float* values) {                                                     \
        forward_rows<ELEMENT, DROPOUT>(hidden, weight, bias, dropout, values);                                             \
    }

#define FORWARD_OF_DTYPE(DTYPE, ELEMENT)                                  \
    FORWARD(vhead_value_head_##DTYPE##_vector, ELEMENT, true, false)         \
    FORWARD(vhead_value_head_##DTYPE##_vector_dropout, ELEMENT, true, true)  \
    FORWARD(vhead_value_head_##DTYPE##_scalar, ELEMENT, false, false)        \
    FORWARD(vhead_value_head_##DTYPE##_scalar_dropout, ELEMENT, false, true) \
    FORWARD_ROWS(vhead_value_head_rows_##DTYPE, ELEMENT, false)              \
    FORWARD_ROWS(vhead_value_head_rows_##DTYPE##_dropout, ELEMENT, true)

FORWARD_OF_DTYPE(float32, Float32)
FORWARD_OF_DTYPE(bfloat16, BFloat16)
FORWARD_OF_DTYPE(float16, Float16)
