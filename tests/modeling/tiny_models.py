"""Tiny language models of every architecture family, with random weights: no ones in a norm, no zeros in a bias."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tests.library_versions import DTYPE

VOCABULARY = 97
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
T5 = {
    **TOKENS,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
}
BART = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
CAUSAL = {
    "llama": COMMON,
    "qwen2": COMMON,
    "gemma2": {**COMMON, "head_dim": 8, "attn_implementation": "eager"},
    "gpt2": GPT2,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {**TOKENS, "hidden_size": 32, "n_layer": 3, "n_head": 4},
}
SEQ2SEQ = {"t5": T5, "bart": BART}
FSMT = {**BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}


def build(architecture: str, dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    """A model in evaluation mode; the same weights every time."""
    generator = torch.Generator().manual_seed(7)
    settings = {**CAUSAL, **SEQ2SEQ, "fsmt": FSMT}[architecture] | overrides
    config = AutoConfig.for_model(architecture, **settings)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_config(config, **{DTYPE: dtype}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


def batch(model: PreTrainedModel, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Right-padded input: the first row is full, the others are two tokens short."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1:, -2:] = 0
    inputs = {"input_ids": tokens * mask, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, length - 2), generator=generator)
    return inputs
