"""The package's torch operations: native kernels where a device has some, plain torch everywhere else.

Each has a plain twin (`..._plain`) that computes the same in torch's own operations, and serves devices without a
kernel, float64, forward-mode differentiation and tensor subclasses, and everything where `VHEAD_PLAIN_TORCH=1`.

A module here has the name that its concept has in the extension, in `rust/core` and in the CUDA sources: `value_head`,
`two_layer`, `token_statistics`, `init`. `vhead.ops.value_head` and `vhead.ops.token_statistics` are the functions.
"""

from vhead.ops.devices import backends as backends
from vhead.ops.init import init_linear_ as init_linear_
from vhead.ops.init import init_normal_ as init_normal_
from vhead.ops.init import init_zeros_ as init_zeros_
from vhead.ops.token_statistics import TokenStatistics as TokenStatistics
from vhead.ops.token_statistics import statistics_in_chunks as statistics_in_chunks
from vhead.ops.token_statistics import statistics_of_logits as statistics_of_logits
from vhead.ops.token_statistics import token_logprobs as token_logprobs
from vhead.ops.token_statistics import token_statistics as token_statistics
from vhead.ops.token_statistics import token_statistics_plain as token_statistics_plain
from vhead.ops.two_layer import value_head_two_layer as value_head_two_layer
from vhead.ops.two_layer import value_head_two_layer_plain as value_head_two_layer_plain
from vhead.ops.value_head import value_head as value_head
from vhead.ops.value_head import value_head_plain as value_head_plain
