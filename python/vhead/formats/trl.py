"""TRL's names, which most other frameworks took over."""

WEIGHT_KEY = "v_head.summary.weight"
BIAS_KEY = "v_head.summary.bias"
