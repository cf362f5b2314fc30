"""The value head without torch, for workers that already hold hidden states.

`CandleValueHead` is the head of the Rust crate `vhead-candle`: candle tensors hold the weights, and safetensors files
carry them from and to torch bit for bit. Its kernels are those of `vhead.ops.value_head`, and so are its values. Hidden
states may be numpy arrays or any CPU tensor that speaks DLPack; they are read where they lie. Importing this module
imports neither torch nor transformers.

    head = CandleValueHead.load("v_head.safetensors")
    values = head(hidden)  # [B, T, H] float32, bfloat16 or float16 -> [B, T] float32
"""

from vhead._native import CandleValueHead

__all__ = ["CandleValueHead"]
