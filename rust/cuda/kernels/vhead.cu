// All kernels, as one translation unit.
#include "forward.cu"
#include "backward.cu"
#include "statistics.cu"
