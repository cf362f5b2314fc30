// What a launch passes, and how its geometry follows from the number of rows N, the hidden size H and the outputs K.
//
// Kernels, with {dtype} = float32, bfloat16 or float16, {path} = vector or scalar, and [_dropout] where elements are dropped:
//
//   vhead_value_head_{dtype}_{path}[_dropout](Rows hidden, const float* weight, const float* bias, u32 outputs,
//                                          Dropout dropout, float* values)
//   vhead_value_head_rows_{dtype}[_dropout](the same arguments; K == 1 on the vector path: several rows a warp)
//   vhead_value_head_backward_{dtype}_{path}[_dropout](Rows hidden, const float* weight, u32 outputs, Dropout dropout,
//                                           const float* grad_values, T* grad_hidden, float* partials)
//   vhead_value_head_backward_weight_{dtype}_{path}[_dropout](the same arguments; grad_hidden is not written)
//   vhead_value_head_add_chunks(const float* partials, u64 chunks, u32 length, float* grad_weight)
//   vhead_value_head_add_rows(const float* grad_values, u64 rows, u32 outputs, float* grad_bias)
//
// weight is [K, H], bias [K] or null, values and grad_values [N, K], grad_hidden [N, H] and partials [chunks, K, H], each null
// where that gradient is not wanted, grad_weight [K, H], grad_bias [K]; all of them are contiguous, and float32 but for
// grad_hidden, which has the dtype of the hidden states. `length` is K * H. Without _dropout the Dropout is not read.
// Everything is overwritten. N, H and K are at least 1, and H is below 2^29.
//
// The vector path needs H % 8 == 0, and 16-byte aligned rows of hidden (so a stride is a multiple of 8 elements in half
// precision and of 4 in float32), weight, grad_hidden and partials. The scalar path needs the alignment of one element.
//
// Geometry (x, y); the bits of a result depend on no grid:
//
//   forward      block 32 * FORWARD_WARPS; grid any number, best ceil(N / FORWARD_WARPS), at most 2^31 - 1
//   forward_rows the same with ceil(N / (FORWARD_WARPS * rows)), rows = 8 / size of an element; it pays where
//                N >= FORWARD_MANY_ROWS: with fewer rows there are too few warps to keep memory busy
//   backward     block BACKWARD_THREADS; grid (chunks, ceil(H / (8 * BACKWARD_THREADS))), chunks = ceil(N / CHUNK)
//   add_chunks   block (ADD_CHUNKS_COLUMNS, SLOTS); grid ceil(length / ADD_CHUNKS_COLUMNS)
//   add_rows     block LANES; grid K
//
// Shared memory is static: a launch asks for none.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The order of additions (rust/core/src/reduce.rs, value_head_backward.rs).
constexpr u32 LANES = 256;
constexpr u32 OCTET = 8;
constexpr u32 CHUNK = 128;
constexpr u32 SLOTS = 8;

// The geometry.
constexpr u32 WARP = 32;
constexpr u32 FORWARD_WARPS = 2;
constexpr u32 FORWARD_ROW_BYTES = 8;  // rows a warp takes times the size of an element
constexpr u32 FORWARD_MANY_ROWS = 8192;
constexpr u32 BACKWARD_THREADS = 64;
constexpr u32 ADD_CHUNKS_COLUMNS = 32;

constexpr u32 MOST_DIMENSIONS = 4;

// [..., H] hidden states whose last dimension is contiguous. Outer dimensions of size 1 are left out and those that can be
// walked as one are merged; what is left is at most MOST_DIMENSIONS, outermost first, strides in elements. Rows are numbered
// in row-major order.
struct Rows {
    const void* data;
    u64 count;
    u32 columns;
    u32 dimensions;
    u64 sizes[MOST_DIMENSIONS];
    i64 strides[MOST_DIMENSIONS];
};

// The mask's seed, from device memory where seed_address is not null, so that a captured graph draws a new mask at each
// replay; an element is dropped where its 16 random bits are below the threshold (1 to 65535).
struct Dropout {
    const u64* seed_address;
    u64 seed;
    u32 threshold;
    float scale;
};

static_assert(sizeof(Rows) == 88 && sizeof(Dropout) == 24, "the Rust side lays the same structs out");
