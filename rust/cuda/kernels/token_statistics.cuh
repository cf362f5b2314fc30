// What a launch of the token statistics' kernels passes, and their geometry. The specification is rust/core/src/token_statistics.rs.
//
//   vhead_token_statistics_fold(LogitsTile tile, const u64* targets, RowState* states)
//   vhead_token_statistics_fold_selected(the same arguments, TokenSelection selection)
//   vhead_token_statistics_finish(const RowState* states, u32 rows, TokenStatistics to)
//   vhead_token_statistics_finish_selected(const RowState* states, TokenSelection selection, SelectedTokens to)
//   vhead_token_statistics_differentiate_{dtype}(LogitsTile tile, RowGradients rows, T* gradients)
//
// {dtype} = float32, bfloat16 or float16 is that of the gradients, [rows, columns] contiguous; in float32 they may be written
// over the products. Targets are int64. Addresses of what belongs to rows are those of the tile's first row.
//
// A tile starts at a column that is a multiple of LOGITS_BLOCK; a row's tiles come in rising order, each once. The one that
// starts at column 0 begins the row's state anew, so that the memory need not be initialised. Rows and columns are at least 1.
// A target or candidate outside the vocabulary is never met: its log-probability is NaN.
//
// Geometry (x):
//
//   fold             block FOLD_THREADS; grid rows
//   finish           block FINISH_THREADS; grid ceil(rows / FINISH_THREADS); finish_selected: grid rows
//   differentiate    block DIFFERENTIATE_THREADS; grid rows * ceil(columns / DIFFERENTIATE_COLUMNS), at most 2^31 - 1
#pragma once
#include "arguments.cuh"

// The order of additions.
constexpr u32 LOGITS_BLOCK = 1024;
constexpr u32 LOGITS_LANES = 16;

// The geometry.
constexpr u32 FOLD_BLOCKS = 8;
constexpr u32 FOLD_THREADS = 128;
constexpr u32 FINISH_THREADS = 128;
constexpr u32 DIFFERENTIATE_THREADS = 128;
constexpr u32 DIFFERENTIATE_COLUMNS = 1024;
// Most of the likeliest tokens of a row that may be asked for.
constexpr u32 MOST_TOP = 128;

static_assert(FOLD_THREADS == FOLD_BLOCKS * LOGITS_LANES, "half a warp owns a block");

// How a product becomes a logit over temperature.
enum Kind : u32 {
    IDENTITY = 0,  // product: `inner` is 1 and there is no bias
    SCALED = 1,    // (product + bias) * inner
    CAPPED = 2,    // outer * tanh((product + bias) * inner)
};

struct LogitsRule {
    float inner;
    float outer;
    u32 kind;
    u32 unused;
};

// float32 products [rows, columns] of hidden states and the vocabulary's tokens from first_column on, and those tokens'
// float32 biases or null; the stride is in elements.
struct LogitsTile {
    const float* products;
    const float* bias;
    u64 row_stride;
    u64 first_column;
    u32 rows;
    u32 columns;
    LogitsRule rule;
};

// What is known of a row so far.
struct RowState {
    double sums[3];  // of exp(d), exp(d) * d and exp(d)^2, with d relative to the peak
    float peak;
    float target;
    u32 is_top1;
    u32 unused;
};

// What is asked for of a row besides its target, and what is known of it so far: int64 candidates [rows, candidate_count] and
// their logits; the likeliest tokens, int64 [rows, top], and theirs. The last three need not be initialised.
struct TokenSelection {
    const u64* candidates;
    float* candidate_logits;
    u64* top_tokens;
    float* top_logits;
    u32 candidate_count;
    u32 top;
};

// [rows, candidate_count], [rows, top] and [rows, top].
struct SelectedTokens {
    float* candidate_logprobs;
    u64* top_tokens;
    float* top_logprobs;
};

// [N] each.
struct TokenStatistics {
    float* logprobs;
    float* entropy;
    float* log_sum_p_squared;
    float* is_top1;
    float* peak;
    float* log_sum;
};

// [rows] each.
struct RowGradients {
    const u64* targets;
    const float* peak;
    const float* log_sum;
    const float* entropy;
    const float* grad_logprobs;
    const float* grad_entropy;
};

static_assert(sizeof(LogitsTile) == 56 && sizeof(RowState) == 40 && sizeof(TokenSelection) == 40,
              "the Rust side lays the same structs out");
