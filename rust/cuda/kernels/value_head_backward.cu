// Gradients of the value head, with the mask drawn again. With g = grad_values and gs[n, k] = g[n, k] * scale:
//
//   grad_hidden[n, h] = sum_k gs[n, k] * (keep(n, h) * weight[k, h]), k in rising order, rounded once
//   grad_weight[k, h] = sum_n (keep(n, h) * gs[n, k]) * hidden[n, h], in chunks of CHUNK rows
//   grad_bias[k]      = sum_n g[n, k], in float64
//
// A block takes one chunk of rows and BACKWARD_THREADS octets of columns. A thread owns an octet: it walks the rows with its
// sums in registers, so that no sum is shared, and hidden states are read once for up to four outputs. More outputs walk the
// chunk again for each further four.
#include "dropout.cuh"
#include "elements.cuh"
#include "reduce.cuh"
#include "rows.cuh"

constexpr u32 BACKWARD_OUTPUTS = 4;
// What a thread has under way of the hidden states.
constexpr u32 BACKWARD_BYTES = 64;

// The pointers of a launch; grad_hidden and partials may be null.
struct Gradients {
    const float* weight;
    const float* grad_values;
    char* grad_hidden;
    float* partials;
    u32 outputs;
};

// What a block's threads share of a chunk's rows: where they start, their part of the mask, and gs of the outputs at hand.
template <bool DROPOUT>
struct Chunk {
    const char* starts[CHUNK];
    typename Mask<DROPOUT>::Row masks[CHUNK];
    float scaled[CHUNK][BACKWARD_OUTPUTS];
};

__device__ __forceinline__ u64 first_row_of_chunk() { return static_cast<u64>(blockIdx.x) * CHUNK; }

__device__ __forceinline__ u32 rows_of_chunk(const Rows& rows) {
    const u64 rest = rows.count - first_row_of_chunk();
    return rest < CHUNK ? static_cast<u32>(rest) : CHUNK;
}

// The gradients of one octet of columns over one chunk, for OUTPUTS outputs from `first` on.
template <class Element, bool VECTOR, bool DROPOUT, bool HIDDEN, u32 OUTPUTS>
struct OctetGradient {
    // Rows whose hidden states are under way.
    static constexpr u32 AHEAD = VECTOR ? BACKWARD_BYTES / (OCTET * Element::BYTES) : 1;

    const Mask<DROPOUT>& mask;
    const Chunk<DROPOUT>& chunk;
    const Gradients& gradients;
    u64 first_row;
    u32 count;
    u32 columns;
    u32 octet;
    u32 first;
    u32 outputs;  // at most OUTPUTS
    u32 rest;     // columns from the octet on
    typename Mask<DROPOUT>::Upper upper;
    typename Mask<DROPOUT>::Octet octet_mask;
    Octet<Element> hidden[AHEAD];
    float weight[OCTET];  // of the output at hand; it stays where there is but one
    float sums[OUTPUTS][OCTET];

    __device__ __forceinline__ OctetGradient(const Mask<DROPOUT>& mask, const Chunk<DROPOUT>& chunk,
                                             const Gradients& gradients, const Rows& rows, u32 octet, u32 first)
        : mask(mask), chunk(chunk), gradients(gradients), columns(rows.columns), octet(octet), first(first), sums() {
        first_row = first_row_of_chunk();
        count = rows_of_chunk(rows);
        outputs = gradients.outputs - first < OUTPUTS ? gradients.outputs - first : OUTPUTS;
        rest = columns - octet * OCTET;
        upper = mask.upper(first_row);
        octet_mask = mask.octet(octet);
        if (HIDDEN && OUTPUTS == 1) load_weight(0, weight);
    }

    __device__ __forceinline__ void load_weight(u32 output, float (&to)[OCTET]) const {
        load_weights<VECTOR>(gradients.weight + static_cast<u64>(output) * columns + octet * OCTET, rest, to);
    }

    // Walks the rows; the gradient of the hidden states takes all outputs at the first of them.
    __device__ __forceinline__ void run() {
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) fetch(i, i);
        u64 offset = (first_row * columns + octet * OCTET) * Element::BYTES;
        for (u32 start = 0; start < count; start += AHEAD) {
#pragma unroll
            for (u32 i = 0; i < AHEAD; ++i) {
                const u32 row = start + i;
                if (row < count) {
                    const Bits128 bits = mask.draw(octet_mask, upper, chunk.masks[row]);
                    if (HIDDEN && gradients.grad_hidden && first == 0) {
                        write_gradient(gradients.grad_hidden + offset, row, bits);
                        offset += static_cast<u64>(columns) * Element::BYTES;
                    }
                    if (gradients.partials) add_row(i, row, bits);
                    fetch(i, row + AHEAD);
                }
            }
        }
        if (gradients.partials) write_sums();
    }

    __device__ __forceinline__ void fetch(u32 i, u32 row) {
        if (gradients.partials && row < count) {
            hidden[i] = load_octet<Element, VECTOR>(chunk.starts[row] + octet * (OCTET * Element::BYTES), rest);
        }
    }

    __device__ __forceinline__ void add_row(u32 i, u32 row, const Bits128& bits) {
#pragma unroll
        for (u32 k = 0; k < OUTPUTS; ++k) {
            if (k < outputs) {
                const float scaled = chunk.scaled[row][k];
#pragma unroll
                for (u32 j = 0; j < OCTET; ++j) {
                    sums[k][j] = fmaf(mask.keep(bits, j, scaled), Element::get(hidden[i], j), sums[k][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void write_gradient(char* to, u32 row, const Bits128& bits) {
        float gradient[OCTET];
        if constexpr (OUTPUTS == 1) {
            multiply(chunk.scaled[row][0], bits, gradient);
        } else {
            const float* grad_values = gradients.grad_values + (first_row + row) * gradients.outputs;
#pragma unroll 1
            for (u32 k = 0; k < gradients.outputs; ++k) {
                load_weight(k, weight);
                const float scaled = load(grad_values + k) * mask.scale;
                if (k == 0) {
                    multiply(scaled, bits, gradient);
                } else {
                    multiply_add(scaled, bits, gradient);
                }
            }
        }
        store_octet<Element, VECTOR>(to, rest, gradient);
    }

    __device__ __forceinline__ void multiply(float scaled, const Bits128& bits, float (&gradient)[OCTET]) const {
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) gradient[j] = scaled * mask.keep(bits, j, weight[j]);
    }

    __device__ __forceinline__ void multiply_add(float scaled, const Bits128& bits, float (&gradient)[OCTET]) const {
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) gradient[j] = fmaf(scaled, mask.keep(bits, j, weight[j]), gradient[j]);
    }

    __device__ __forceinline__ void write_sums() const {
        const u64 line = (first_row / CHUNK) * gradients.outputs + first;
#pragma unroll
        for (u32 k = 0; k < OUTPUTS; ++k) {
            if (k < outputs) {
                float* to = gradients.partials + (line + k) * columns + octet * OCTET;
                store_octet<Float32, VECTOR>(reinterpret_cast<char*>(to), rest, sums[k]);
            }
        }
    }
};

// Fills in what belongs to the outputs from `first` on, and with the first ones everything else.
template <class Element, bool DROPOUT>
__device__ __forceinline__ void fill(Chunk<DROPOUT>& chunk, const Mask<DROPOUT>& mask, const Rows& hidden,
                                     const Gradients& gradients, u32 first) {
    for (u32 i = threadIdx.x; i < rows_of_chunk(hidden); i += BACKWARD_THREADS) {
        const u64 row = first_row_of_chunk() + i;
        if (first == 0) {
            chunk.starts[i] = row_start<Element>(hidden, row);
            chunk.masks[i] = mask.row(row);
        }
#pragma unroll
        for (u32 k = 0; k < BACKWARD_OUTPUTS; ++k) {
            if (first + k < gradients.outputs) {
                chunk.scaled[i][k] = load(gradients.grad_values + row * gradients.outputs + first + k) * mask.scale;
            }
        }
    }
}

template <class Element, bool VECTOR, bool DROPOUT, bool HIDDEN>
__device__ __forceinline__ void backward(Chunk<DROPOUT>& chunk, const Rows& hidden, const Dropout& dropout,
                                         const Gradients& gradients) {
    const Mask<DROPOUT> mask(dropout);
    const u32 octet = blockIdx.y * BACKWARD_THREADS + threadIdx.x;
    const bool inside = octet < (hidden.columns + OCTET - 1) / OCTET;
    fill<Element>(chunk, mask, hidden, gradients, 0);
    __syncthreads();
    if (gradients.outputs == 1) {
        if (inside) OctetGradient<Element, VECTOR, DROPOUT, HIDDEN, 1>(mask, chunk, gradients, hidden, octet, 0).run();
        return;
    }
    // The hidden states' gradient takes all outputs at once.
    const u32 end = gradients.partials ? gradients.outputs : 1;
    for (u32 first = 0; first < end; first += BACKWARD_OUTPUTS) {
        if (first > 0) {
            __syncthreads();
            fill<Element>(chunk, mask, hidden, gradients, first);
            __syncthreads();
        }
        if (inside) {
            OctetGradient<Element, VECTOR, DROPOUT, HIDDEN, BACKWARD_OUTPUTS>(mask, chunk, gradients, hidden, octet, first)
                .run();
        }
    }
}

#define BACKWARD(NAME, ELEMENT, VECTOR, DROPOUT, HIDDEN)                                                                  \
    extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, VECTOR ? (DROPOUT && HIDDEN ? 8 : 10) : 6)            \
        NAME(const __grid_constant__ Rows hidden, const float* weight, u32 outputs,                                       \
             const __grid_constant__ Dropout dropout, const float* grad_values, void* grad_hidden, float* partials) {     \
        __shared__ Chunk<DROPOUT> chunk;                                                                                  \
        backward<ELEMENT, VECTOR, DROPOUT, HIDDEN>(                                                                       \
            chunk, hidden, dropout, {weight, grad_values, static_cast<char*>(grad_hidden), partials, outputs});           \
    }

#define BACKWARD_OF_PATH(DTYPE, ELEMENT, PATH, VECTOR)                                         \
    BACKWARD(vhead_value_head_backward_##DTYPE##_##PATH, ELEMENT, VECTOR, false, true)                    \
    BACKWARD(vhead_value_head_backward_##DTYPE##_##PATH##_dropout, ELEMENT, VECTOR, true, true)           \
    BACKWARD(vhead_value_head_backward_weight_##DTYPE##_##PATH, ELEMENT, VECTOR, false, false)            \
    BACKWARD(vhead_value_head_backward_weight_##DTYPE##_##PATH##_dropout, ELEMENT, VECTOR, true, false)

#define BACKWARD_OF_DTYPE(DTYPE, ELEMENT)            \
    BACKWARD_OF_PATH(DTYPE, ELEMENT, vector, true)   \
    BACKWARD_OF_PATH(DTYPE, ELEMENT, scalar, false)

BACKWARD_OF_DTYPE(float32, Float32)
BACKWARD_OF_DTYPE(bfloat16, BFloat16)
BACKWARD_OF_DTYPE(float16, Float16)

// Adds the chunks' sums: chunk c goes to slot c % SLOTS, in rising order, and the slots are folded by halves.
extern "C" __global__ void __launch_bounds__(ADD_CHUNKS_COLUMNS * SLOTS)
    vhead_value_head_add_chunks(const float* partials, u64 chunks, u32 length, float* grad_weight) {
    __shared__ float slots[SLOTS][ADD_CHUNKS_COLUMNS];
    const u64 column = static_cast<u64>(blockIdx.x) * ADD_CHUNKS_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < length) {
#pragma unroll 4
        for (u64 chunk = threadIdx.y; chunk < chunks; chunk += SLOTS) sum += load(partials + chunk * length + column);
    }
    slots[threadIdx.y][threadIdx.x] = sum;
#pragma unroll
    for (u32 half = SLOTS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) slots[threadIdx.y][threadIdx.x] += slots[threadIdx.y + half][threadIdx.x];
    }
    if (threadIdx.y == 0 && column < length) store(grad_weight + column, slots[0][threadIdx.x]);
}

// Adds a column of grad_values: thread t is lane t of the order of additions, in float64. Eight neighbours are an octet, so
// the 32 sums that are folded by halves are those of 32 threads.
extern "C" __global__ void __launch_bounds__(LANES)
    vhead_value_head_add_rows(const float* grad_values, u64 rows, u32 outputs, float* grad_bias) {
    __shared__ double octets[WARP];
    double sum = 0.0;
#pragma unroll 8
    for (u64 row = threadIdx.x; row < rows; row += LANES) {
        sum += static_cast<double>(load(grad_values + row * outputs + blockIdx.x));
    }
#pragma unroll
    for (u32 distance = 1; distance < OCTET; distance *= 2) sum += shuffle_xor(sum, distance);
    if (threadIdx.x % OCTET == 0) octets[threadIdx.x / OCTET] = sum;
    __syncthreads();
    if (threadIdx.x < WARP) {
        const double total = fold_halves(octets[threadIdx.x]);
        if (threadIdx.x == 0) store(grad_bias + blockIdx.x, static_cast<float>(total));
    }
}
