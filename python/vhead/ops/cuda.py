"""Whether this package's CUDA kernels run on a tensor's device."""

from torch import Tensor

from vhead import _native


def has_cuda_kernels(tensor: Tensor) -> bool:
    """Whether a tensor is on a CUDA device that has kernels of this package; they are loaded at the first question.

    Plain torch serves a device for which there is no kernel image; `vhead.backends()` says so and why. Whatever else
    goes wrong is an error: nothing falls back in silence.

    Raises:
        CudaError: The kernels could not be loaded, or the process was forked after CUDA had started.
    """
    return tensor.is_cuda and _native.cuda_absence(tensor.get_device()) is None
