"""The package's torch operations: native kernels where a device has some, plain torch everywhere else.

Each has a plain twin (`..._plain`) that computes the same in torch's own operations, and serves devices without a
kernel, float64, forward-mode differentiation and tensor subclasses, and everything where `VHEAD_PLAIN_TORCH=1`.
"""

from vhead.ops.devices import backends as backends
from vhead.ops.fresh_weights import init_linear_ as init_linear_
from vhead.ops.fresh_weights import init_normal_ as init_normal_
from vhead.ops.projection import value_head as value_head
from vhead.ops.projection import value_head_plain as value_head_plain
from vhead.ops.statistics import TokenStatistics as TokenStatistics
from vhead.ops.statistics import statistics_of_logits as statistics_of_logits
from vhead.ops.statistics import token_logprobs as token_logprobs
from vhead.ops.statistics import token_statistics as token_statistics
from vhead.ops.statistics import token_statistics_plain as token_statistics_plain
from vhead.ops.two_layer import value_head_two_layer as value_head_two_layer
from vhead.ops.two_layer import value_head_two_layer_plain as value_head_two_layer_plain
