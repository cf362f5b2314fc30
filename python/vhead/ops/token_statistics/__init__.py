"""Log-probabilities and entropies of tokens from hidden states, without their logits.

Products of hidden states and the lm_head's weight are computed a tile at a time, by torch's own matrix
multiplication, into one small buffer; a kernel reads each tile once, while it is in the cache. The vocabulary is the
outer loop, so that the weight is read once. Backward computes the tiles again.
"""

from vhead.ops.token_statistics.functions import accumulating_token_logprobs as accumulating_token_logprobs
from vhead.ops.token_statistics.functions import statistics_in_chunks as statistics_in_chunks
from vhead.ops.token_statistics.functions import statistics_of_logits as statistics_of_logits
from vhead.ops.token_statistics.functions import token_logprobs as token_logprobs
from vhead.ops.token_statistics.functions import token_statistics as token_statistics
from vhead.ops.token_statistics.functions import token_statistics_plain as token_statistics_plain
from vhead.ops.token_statistics.operator import gradient_of as gradient_of
from vhead.ops.token_statistics.results import TokenStatistics as TokenStatistics
