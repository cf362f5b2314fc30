// Where rows start.
#pragma once
#include "arguments.cuh"

template <class Element>
__device__ __forceinline__ const char* row_start(const Rows& rows, u64 row) {
    i64 offset = 0;
    u64 outer = row;
    // Unrolled, so that sizes and strides are read as constants rather than through a pointer.
#pragma unroll
    for (u32 i = MOST_DIMENSIONS; i-- > 0;) {
        if (i < rows.dimensions) {
            const u64 size = rows.sizes[i];
            offset += static_cast<i64>(i == 0 ? outer : outer % size) * rows.strides[i];
            outer = i == 0 ? 0 : outer / size;
        }
    }
    return static_cast<const char*>(rows.data) + offset * static_cast<i64>(Element::BYTES);
}
