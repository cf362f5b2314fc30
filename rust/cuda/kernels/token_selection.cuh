// Tokens of a row that are asked for besides its target, from the lines of a round: rust/core/src/token_selection.rs.
//
// A thread reads the logits of its candidates from the lines. The likeliest tokens are a sorted list in shared memory, an entry
// for each thread. A round without a logit above the list's last, which is most of them, costs eight comparisons. In the others
// each thread offers the first of its tokens, the block agrees on the first of those, the thread that offered it looks for its
// next, and every thread moves its entry of the list.
#pragma once
#include "device.cuh"
#include "token_statistics.cuh"

static_assert(MOST_TOP == FOLD_THREADS, "a thread has an entry of the list");

constexpr u32 NO_PLACE = 0xffffffff;
constexpr u64 NO_TOKEN = ~u64{0};

// A logit, and its place in the round.
struct Ranked {
    float logit;
    u32 place;
};

struct LikeliestMemory {
    u64 tokens[MOST_TOP];
    float logits[MOST_TOP];  // NaN where there is no token yet
    Ranked offers[FOLD_THREADS / WARP];
};

// The larger one comes first, of equals the one with the smaller id. NaN comes before nothing and after nothing.
__device__ __forceinline__ bool precedes(const Ranked& a, const Ranked& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.place < b.place);
}

// Whether a logit goes before an entry of the list, whose equals have smaller ids.
__device__ __forceinline__ bool displaces(float logit, float entry) { return !(entry >= logit); }

__device__ __forceinline__ void begin_selection(LikeliestMemory& memory, const TokenSelection& selection, bool is_first) {
    const u64 row = blockIdx.x;
    if (is_first) {
        float* logits = selection.candidate_logits + row * selection.candidate_count;
        for (u32 i = threadIdx.x; i < selection.candidate_count; i += FOLD_THREADS) store(logits + i, not_a_number());
    }
    const bool is_known = !is_first && threadIdx.x < selection.top;
    const u64 entry = row * selection.top + threadIdx.x;
    memory.tokens[threadIdx.x] = is_known ? load_written(selection.top_tokens + entry) : NO_TOKEN;
    memory.logits[threadIdx.x] = is_known ? load_written(selection.top_logits + entry) : not_a_number();
}

__device__ __forceinline__ void end_selection(const LikeliestMemory& memory, const TokenSelection& selection) {
    if (threadIdx.x < selection.top) {
        const u64 entry = static_cast<u64>(blockIdx.x) * selection.top + threadIdx.x;
        store(selection.top_tokens + entry, memory.tokens[threadIdx.x]);
        store(selection.top_logits + entry, memory.logits[threadIdx.x]);
    }
}

// Notes the logits of the candidates in a round, of which `round` is the first token and `count` are there. A candidate is the
// same thread's in every round.
template <class Lines>
__device__ __forceinline__ void note_candidates(const TokenSelection& selection, const Lines& lines, u64 round, u32 count) {
    const u64 start = static_cast<u64>(blockIdx.x) * selection.candidate_count;
    for (u32 i = threadIdx.x; i < selection.candidate_count; i += FOLD_THREADS) {
        const u64 place = load(selection.candidates + start + i) - round;
        if (place < count) store(selection.candidate_logits + start + i, lines[place / LOGITS_BLOCK][place % LOGITS_BLOCK]);
    }
}

// The first of a thread's logits that come after `last`; the block's places begin at `start`.
__device__ __forceinline__ Ranked first_after(const Ranked& last, const float* line, u32 start, u32 count, u32 lane) {
    Ranked first = {minus_infinity(), NO_PLACE};
#pragma unroll 8
    for (u32 i = lane; i < count; i += LOGITS_LANES) {
        const Ranked next = {line[i], start + i};
        if (precedes(last, next) && precedes(next, first)) first = next;
    }
    return first;
}

// The first of all threads' offers, in every thread.
__device__ __forceinline__ Ranked first_offer(LikeliestMemory& memory, Ranked first) {
#pragma unroll
    for (u32 half = WARP / 2; half > 0; half /= 2) {
        const Ranked other = {shuffle_xor(first.logit, half), shuffle_xor(first.place, half)};
        if (precedes(other, first)) first = other;
    }
    if (threadIdx.x % WARP == 0) memory.offers[threadIdx.x / WARP] = first;
    __syncthreads();
#pragma unroll
    for (u32 warp = 0; warp < FOLD_THREADS / WARP; ++warp) {
        const Ranked other = memory.offers[warp];
        if (precedes(other, first)) first = other;
    }
    return first;
}

// Takes a round's tokens into the list, of which `round` is the first; its lines are full, and `peak` is its largest logit.
__device__ __forceinline__ void note_likeliest(LikeliestMemory& memory, u32 top, float peak, u64 round, const float* line,
                                               u32 count) {
    if (!displaces(peak, memory.logits[top - 1])) return;
    const u32 start = threadIdx.x / LOGITS_LANES * LOGITS_BLOCK, lane = threadIdx.x % LOGITS_LANES;
    // Infinity at the round's very first place is left out by this, in a row of which nothing is known then.
    const Ranked before_all = {as_float(0x7f800000), 0};
    Ranked offer = first_after(before_all, line, start, count, lane);
#pragma unroll 1
    while (true) {
        const Ranked first = first_offer(memory, offer);
        if (first.place == NO_PLACE || !displaces(first.logit, memory.logits[top - 1])) return;
        const u32 entry = threadIdx.x, before = entry > 0 ? entry - 1 : 0;
        // Entries behind the list's last move as well, so that no thread takes another way to the next offer.
        const bool moves = displaces(first.logit, memory.logits[entry]);
        const bool follows = entry > 0 && displaces(first.logit, memory.logits[before]);
        const float logit = follows ? memory.logits[before] : moves ? first.logit : memory.logits[entry];
        const u64 token = follows ? memory.tokens[before] : moves ? round + first.place : memory.tokens[entry];
        if (offer.place == first.place) offer = first_after(first, line, start, count, lane);
        __syncthreads();
        memory.logits[entry] = logit;
        memory.tokens[entry] = token;
    }
}
