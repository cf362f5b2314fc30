// Token statistics from tiles of logits: rust/core/src/simd/token_statistics.rs and row_state.rs.
//
// The order of additions gives a block of 1024 columns 16 lanes that take their columns one after the other, and gives blocks
// to rows one after the other. Half a warp owns a block, a thread a lane; a row's eight next blocks are summed side by side,
// once the eight largest logits are known, which is all that a block needs from those before it. The float64 sums are few:
// 48 additions a block, in 24 threads at a time.
#include "elementary.cuh"
#include "elements.cuh"
#include "token_selection.cuh"
#include "token_statistics.cuh"

// A block's line and the next one's start 16 banks apart: the halves of a warp read different banks.
constexpr u32 LINE = LOGITS_BLOCK + LOGITS_LANES;
constexpr u32 SUMS = 3;
// Lanes of a block, and one more that spreads the blocks over the banks.
constexpr u32 LANES_APART = LOGITS_LANES + 1;

struct alignas(16) FoldMemory {
    float lines[FOLD_BLOCKS][LINE];
    float peaks[2][FOLD_BLOCKS];  // of this round and of the one before, which may still be read
    float lanes[SUMS][FOLD_BLOCKS][LANES_APART];
    double sums[SUMS][FOLD_BLOCKS];
    float peak;  // of the tiles before this one
    float target;
    u32 tied;
};

template <u32 KIND>
__device__ __forceinline__ float logit(const LogitsRule& rule, float product, float bias) {
    if (KIND == IDENTITY) return product;
    const float scaled = (product + bias) * rule.inner;
    return KIND == CAPPED ? hyperbolic_tangent(scaled) * rule.outer : scaled;
}

__device__ __forceinline__ bool are_vectors(const void* a, const void* b, u64 stride) {
    return ((reinterpret_cast<u64>(a) | reinterpret_cast<u64>(b)) % sizeof(Quad) | stride % 4) == 0;
}

// Loads of a thread that are under way together.
template <u32 KIND>
constexpr u32 QUADS = KIND == IDENTITY ? 8 : KIND == SCALED ? 4 : 2;

// `fill` for a whole block that can be read 16 bytes at a time.
template <u32 KIND>
__device__ __forceinline__ float fill_quads(const LogitsRule& rule, const float* products, const float* bias, u32 lane,
                                            float* line) {
    float peak = minus_infinity();
#pragma unroll 1
    for (u32 first = lane; first < LOGITS_BLOCK / 4; first += QUADS<KIND> * LOGITS_LANES) {
        Quad loaded[QUADS<KIND>], added[QUADS<KIND>] = {};
#pragma unroll
        for (u32 i = 0; i < QUADS<KIND>; ++i) {
            const u32 quad = first + i * LOGITS_LANES;
            loaded[i] = load_once(reinterpret_cast<const Quad*>(products) + quad);
            if (KIND != IDENTITY && bias) added[i] = load(reinterpret_cast<const Quad*>(bias) + quad);
        }
#pragma unroll
        for (u32 i = 0; i < QUADS<KIND>; ++i) {
            Quad logits;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float z = logit<KIND>(rule, as_float(loaded[i].words[j]), as_float(added[i].words[j]));
                peak = z > peak ? z : peak;
                logits.words[j] = as_bits(z);
            }
            reinterpret_cast<Quad*>(line)[first + i * LOGITS_LANES] = logits;
        }
    }
    return peak;
}

// Writes a block's logits to its line, minus infinity up to a whole number of lanes; the largest of this thread's, where NaN
// is none.
template <u32 KIND>
__device__ __forceinline__ float fill(const LogitsTile& tile, const float* row, u32 start, u32 count, u32 lane,
                                      float* line) {
    const float* products = row + start;
    const float* bias = tile.bias ? tile.bias + start : nullptr;
    if (count == LOGITS_BLOCK && are_vectors(products, bias, 0)) {
        return fill_quads<KIND>(tile.rule, products, bias, lane, line);
    }
    float peak = minus_infinity();
#pragma unroll 1
    for (u32 i = lane; i < count + lane; i += LOGITS_LANES) {
        float z = minus_infinity();
        if (i < count) z = logit<KIND>(tile.rule, load(products + i), KIND != IDENTITY && bias ? load(bias + i) : 0.0f);
        peak = z > peak ? z : peak;
        line[i] = z;
    }
    return peak;
}

// This lane's part of a block: sums of e, e * d and e * e, with d = z - reference and e = exp(d).
__device__ __forceinline__ void add_lane(const float* line, u32 groups, float reference, float (&sums)[SUMS]) {
    sums[0] = sums[1] = sums[2] = 0.0f;
#pragma unroll 8
    for (u32 group = 0; group < groups; ++group) {
        const float d = line[group * LOGITS_LANES] - reference;
        const bool is_never = d < LEAST;
        const float clamped = is_never ? LEAST : d;
        const float e = exponential_unless(is_never, clamped);
        sums[0] += e;
        sums[1] = fmaf(e, clamped, sums[1]);
        sums[2] = fmaf(e, e, sums[2]);
    }
}

// Makes sums relative to a larger peak.
__device__ __forceinline__ void rise(RowState& state, float peak) {
    if (state.peak > minus_infinity()) {
        const double delta = static_cast<double>(state.peak) - static_cast<double>(peak);
        const double factor = exponential(delta);
        // Where the factor is zero delta may be infinite.
        const double shifted = factor > 0.0 ? state.sums[1] + state.sums[0] * delta : state.sums[0];
        state.sums[0] = state.sums[0] * factor;
        state.sums[1] = shifted * factor;
        state.sums[2] = state.sums[2] * factor * factor;
    }
    state.peak = peak;
}

// A round's blocks, one after the other; the target is in block `target_block`, which may be none of them.
__device__ __forceinline__ void merge(RowState& state, const FoldMemory& memory, const float* peaks, u32 blocks,
                                      u64 target_block) {
    for (u32 block = 0; block < blocks; ++block) {
        const float peak = peaks[block];
        const bool rises = peak > state.peak;
        if (rises) state.is_top1 = 0;
        if (block == target_block) {
            state.target = memory.target;
            state.is_top1 = rises && memory.target == peak && !memory.tied;
        }
        if (rises) rise(state, peak);
#pragma unroll
        for (u32 i = 0; i < SUMS; ++i) state.sums[i] += memory.sums[i][block];
    }
}

__device__ __forceinline__ RowState new_row() {
    return {{0.0, 0.0, 0.0}, minus_infinity(), not_a_number(), 0, 0};
}

// What a thread has to do with a row.
struct Share {
    u32 block, lane;
    float* line;

    __device__ __forceinline__ explicit Share(FoldMemory& memory)
        : block(threadIdx.x / LOGITS_LANES), lane(threadIdx.x % LOGITS_LANES), line(memory.lines[block]) {}

    // Columns of this thread's block that are there, `start` being its first.
    __device__ __forceinline__ u32 count(const LogitsTile& tile, u32 start) const {
        const u32 left = start < tile.columns ? tile.columns - start : 0;
        return left < LOGITS_BLOCK ? left : LOGITS_BLOCK;
    }
};

// The block's line, and its largest logit, which all of its threads get.
__device__ __forceinline__ float fill_block(const LogitsTile& tile, const float* row, u32 start, u32 count,
                                            const Share& share) {
    float peak;
    switch (tile.rule.kind) {
        case IDENTITY: peak = fill<IDENTITY>(tile, row, start, count, share.lane, share.line); break;
        case SCALED: peak = fill<SCALED>(tile, row, start, count, share.lane, share.line); break;
        default: peak = fill<CAPPED>(tile, row, start, count, share.lane, share.line);
    }
#pragma unroll
    for (u32 half = LOGITS_LANES / 2; half > 0; half /= 2) {
        const float other = shuffle_xor(peak, half);
        peak = other > peak ? other : peak;
    }
    return peak;
}

// Notes the target's logit, if it is in this thread's block, and whether an earlier one of the block is as large as the
// largest. `place` is the target's in the block, of which `count` are there.
__device__ __forceinline__ void note_target(FoldMemory& memory, const Share& share, u64 place, u32 count, float peak) {
    u32 ties = 0;
    if (place < count) {
        for (u32 i = share.lane; i < place; i += LOGITS_LANES) ties |= share.line[i] == peak;
    }
#pragma unroll
    for (u32 half = LOGITS_LANES / 2; half > 0; half /= 2) ties |= shuffle_xor(ties, half);
    if (place < count && share.lane == 0) {
        memory.target = share.line[place];
        memory.tied = ties;
    }
}

// The sums of a round's blocks over their lanes, one after the other.
__device__ __forceinline__ void add_lanes(FoldMemory& memory) {
    const u32 which = threadIdx.x / FOLD_BLOCKS, block = threadIdx.x % FOLD_BLOCKS;
    if (which < SUMS) {
        double sum = 0.0;
        for (u32 lane = 0; lane < LOGITS_LANES; ++lane) sum += static_cast<double>(memory.lanes[which][block][lane]);
        memory.sums[which][block] = sum;
    }
}

// Adds a tile to a row's state; to the likeliest tokens and candidates as well where `selection` asks for some.
template <bool SELECTS>
__device__ __forceinline__ void fold_row(FoldMemory& memory, LikeliestMemory* likeliest, const LogitsTile& tile,
                                         const u64* targets, RowState* states, const TokenSelection* selection) {
    const Share share(memory);
    const float* row = tile.products + blockIdx.x * tile.row_stride;
    // Huge where the target lies before the tile or outside the vocabulary.
    const u64 target = load(targets + blockIdx.x) - tile.first_column;
    // The first thread's; the others follow the peak alone.
    RowState state = new_row();
    if (threadIdx.x == 0) {
        if (tile.first_column > 0) state = load_written(states + blockIdx.x);
        memory.peak = state.peak;
        // The compiler may read these where the target is in no block.
        memory.target = state.target;
        memory.tied = 0;
    }
    if constexpr (SELECTS) begin_selection(*likeliest, *selection, tile.first_column == 0);
    __syncthreads();
    float peak = memory.peak;
    for (u32 first = 0, round = 0; first < tile.columns; first += FOLD_BLOCKS * LOGITS_BLOCK, ++round) {
        const u32 start = first + share.block * LOGITS_BLOCK, count = share.count(tile, start);
        float* peaks = memory.peaks[round % 2];
        const float own_peak = fill_block(tile, row, start, count, share);
        if (share.lane == 0) peaks[share.block] = own_peak;
        __syncthreads();

        float reference = peak, largest = minus_infinity();
        for (u32 block = 0; block < FOLD_BLOCKS; ++block) {
            peak = peaks[block] > peak ? peaks[block] : peak;
            if (SELECTS) largest = peaks[block] > largest ? peaks[block] : largest;
            if (block == share.block) reference = peak;
        }
        // Nothing but minus infinity and NaN so far: relative to zero, the former count nothing.
        if (reference == minus_infinity()) reference = 0.0f;
        float sums[SUMS];
        add_lane(share.line + share.lane, (count + LOGITS_LANES - 1) / LOGITS_LANES, reference, sums);
#pragma unroll
        for (u32 i = 0; i < SUMS; ++i) memory.lanes[i][share.block][share.lane] = sums[i];
        note_target(memory, share, target - start, count, own_peak);
        if constexpr (SELECTS) {
            const u64 round_start = tile.first_column + first;
            const u32 left = tile.columns - first, most = FOLD_BLOCKS * LOGITS_BLOCK;
            note_candidates(*selection, memory.lines, round_start, left < most ? left : most);
            if (selection->top > 0) note_likeliest(*likeliest, selection->top, largest, round_start, share.line, count);
        }
        __syncthreads();

        if (threadIdx.x < WARP) {
            add_lanes(memory);
            __syncwarp();
            const u32 left = (tile.columns - first + LOGITS_BLOCK - 1) / LOGITS_BLOCK;
            const u32 blocks = left < FOLD_BLOCKS ? left : FOLD_BLOCKS;
            const u64 target_block = target < first ? FOLD_BLOCKS : (target - first) / LOGITS_BLOCK;
            if (threadIdx.x == 0) merge(state, memory, peaks, blocks, target_block);
        }
    }
    if (threadIdx.x == 0) store(states + blockIdx.x, state);
    if constexpr (SELECTS) end_selection(*likeliest, *selection);
}

extern "C" __global__ void __launch_bounds__(FOLD_THREADS)
vhead_token_statistics_fold(const __grid_constant__ LogitsTile tile, const u64* targets, RowState* states) {
    __shared__ FoldMemory memory;
    fold_row<false>(memory, nullptr, tile, targets, states, nullptr);
}

extern "C" __global__ void __launch_bounds__(FOLD_THREADS)
vhead_token_statistics_fold_selected(const __grid_constant__ LogitsTile tile, const u64* targets, RowState* states,
                                     const __grid_constant__ TokenSelection selection) {
    __shared__ FoldMemory memory;
    __shared__ LikeliestMemory likeliest;
    fold_row<true>(memory, &likeliest, tile, targets, states, &selection);
}

// Whether a row's numbers are any: not so where nothing but minus infinity came, or NaN, or infinity.
__device__ __forceinline__ bool is_row_known(const RowState& state) {
    return state.peak != minus_infinity() && state.sums[0] - state.sums[0] == 0.0;
}

__device__ __forceinline__ double logprob_of(float logit, const RowState& state, double log_sum) {
    return (static_cast<double>(logit) - static_cast<double>(state.peak)) - log_sum;
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
vhead_token_statistics_finish(const RowState* states, u32 rows, const __grid_constant__ TokenStatistics to) {
    const u32 row = blockIdx.x * FINISH_THREADS + threadIdx.x;
    if (row >= rows) return;
    const RowState state = load_written(states + row);
    const double sum = state.sums[0];
    const bool is_known = is_row_known(state);
    const double log_sum = logarithm(sum);
    const double logprob = logprob_of(state.target, state, log_sum);
    const double entropy = log_sum - state.sums[1] / sum;
    const double log_sum_p_squared = logarithm(state.sums[2]) - 2.0 * log_sum;
    store(to.logprobs + row, is_known ? static_cast<float>(logprob) : not_a_number());
    store(to.entropy + row, is_known ? static_cast<float>(entropy) : not_a_number());
    store(to.log_sum_p_squared + row, is_known ? static_cast<float>(log_sum_p_squared) : not_a_number());
    store(to.is_top1 + row, is_known && state.is_top1 ? 1.0f : 0.0f);
    store(to.peak + row, is_known ? state.peak : not_a_number());
    store(to.log_sum + row, is_known ? static_cast<float>(log_sum) : not_a_number());
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
vhead_token_statistics_finish_selected(const RowState* states, const __grid_constant__ TokenSelection selection,
                                       const __grid_constant__ SelectedTokens to) {
    const u64 row = blockIdx.x;
    const RowState state = load_written(states + row);
    const bool is_known = is_row_known(state);
    const double log_sum = logarithm(state.sums[0]);
    const auto logprob = [&](float logit) {
        return is_known ? static_cast<float>(logprob_of(logit, state, log_sum)) : not_a_number();
    };
    for (u32 i = threadIdx.x; i < selection.candidate_count; i += FINISH_THREADS) {
        const u64 place = row * selection.candidate_count + i;
        store(to.candidate_logprobs + place, logprob(load_written(selection.candidate_logits + place)));
    }
    for (u32 i = threadIdx.x; i < selection.top; i += FINISH_THREADS) {
        const u64 place = row * selection.top + i;
        store(to.top_tokens + place, is_known ? load_written(selection.top_tokens + place) : NO_TOKEN);
        store(to.top_logprobs + place, logprob(load_written(selection.top_logits + place)));
    }
}

// Eight products, which this thread alone overwrites. On the scalar path those from number `rest` on lie past the row's end.
template <bool VECTOR>
__device__ __forceinline__ void load_products(const float* from, u32 rest, float (&products)[OCTET]) {
    if constexpr (VECTOR) {
#pragma unroll
        for (u32 i = 0; i < OCTET; i += 4) {
            const Quad quad = load_written(reinterpret_cast<const Quad*>(from + i));
#pragma unroll
            for (u32 j = 0; j < 4; ++j) products[i + j] = as_float(quad.words[j]);
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < OCTET; ++j) products[j] = j < rest ? load_written(from + j) : 0.0f;
    }
}

// What backward knows of a row.
struct RowGradient {
    float peak, log_sum, entropy, grad_logprob, grad_entropy;
};

// The gradient of a product.
__device__ __forceinline__ float differentiate(const LogitsRule& rule, const RowGradient& row, float product, float bias,
                                               bool is_target) {
    float z = rule.kind == IDENTITY ? product : (product + bias) * rule.inner;
    float slope = rule.inner;
    if (rule.kind == CAPPED) {
        const float t = hyperbolic_tangent(z);
        z = t * rule.outer;
        slope = (1.0f - t * t) * (rule.inner * rule.outer);
    }
    const float logp = (z - row.peak) - row.log_sum;
    const bool is_never = logp < LEAST;
    const float clamped = is_never ? LEAST : logp;
    const float p = exponential_unless(is_never, clamped);
    const float pull = fmaf(row.grad_entropy, clamped + row.entropy, row.grad_logprob);
    return ((is_target ? row.grad_logprob : 0.0f) - p * pull) * slope;
}

template <class Element>
__device__ __forceinline__ void differentiate_octet(const LogitsTile& tile, const RowGradients& rows, char* gradients) {
    const u32 segments = (tile.columns + DIFFERENTIATE_COLUMNS - 1) / DIFFERENTIATE_COLUMNS;
    const u32 n = blockIdx.x / segments;
    const u32 column = blockIdx.x % segments * DIFFERENTIATE_COLUMNS + threadIdx.x * OCTET;
    if (column >= tile.columns) return;
    const u64 target = load(rows.targets + n) - tile.first_column;
    const RowGradient row = {load(rows.peak + n), load(rows.log_sum + n), load(rows.entropy + n), load(rows.grad_logprobs + n),
                             load(rows.grad_entropy + n)};
    const float* products = tile.products + n * tile.row_stride + column;
    char* to = gradients + (static_cast<u64>(n) * tile.columns + column) * Element::BYTES;
    const u32 rest = tile.columns - column;
    const bool is_vector = are_vectors(tile.products, tile.bias, tile.row_stride) && are_vectors(gradients, nullptr, 0) &&
                           tile.columns % OCTET == 0;
    float values[OCTET], biases[OCTET] = {};
    if (is_vector) {
        load_products<true>(products, rest, values);
        if (tile.bias) load_weights<true>(tile.bias + column, rest, biases);
    } else {
        load_products<false>(products, rest, values);
        if (tile.bias) load_weights<false>(tile.bias + column, rest, biases);
    }
#pragma unroll
    for (u32 j = 0; j < OCTET; ++j) values[j] = differentiate(tile.rule, row, values[j], biases[j], target == column + j);
    if (is_vector) {
        store_octet<Element, true>(to, rest, values);
    } else {
        store_octet<Element, false>(to, rest, values);
    }
}

#define VHEAD_DIFFERENTIATE(NAME, ELEMENT)                                                                    \
    extern "C" __global__ void __launch_bounds__(DIFFERENTIATE_THREADS)                                       \
    vhead_token_statistics_differentiate_##NAME(const __grid_constant__ LogitsTile tile,                      \
                                                const __grid_constant__ RowGradients rows, void* gradients) { \
        differentiate_octet<ELEMENT>(tile, rows, static_cast<char*>(gradients));                              \
    }

VHEAD_DIFFERENTIATE(float32, Float32)
VHEAD_DIFFERENTIATE(bfloat16, BFloat16)
VHEAD_DIFFERENTIATE(float16, Float16)
