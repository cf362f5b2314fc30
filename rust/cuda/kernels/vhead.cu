// All kernels, as one translation unit.
#include "value_head.cu"
#include "value_head_backward.cu"
#include "token_statistics.cu"
