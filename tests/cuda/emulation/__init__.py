"""Ways to run CUDA kernels on a machine without a GPU."""
