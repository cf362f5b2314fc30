"""The old name of `vhead.pretrained`."""

import warnings

from vhead.pretrained import ValueHeadConfig, ValueHeadModel, ValueHeadModelOutput

__all__ = ["ValueHeadConfig", "ValueHeadModel", "ValueHeadModelOutput"]

warnings.warn("vhead.native is now called vhead.pretrained, with the same names", FutureWarning, stacklevel=2)
