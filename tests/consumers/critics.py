"""A tiny critic's body, and what its head must say."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

H, VOCABULARY = 32, 97


def language_model(**settings):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def expected_values(model, states):
    """The head in float64, of weights as they are now."""
    summary = model.v_head.summary
    return torch.nn.functional.linear(states.double(), summary.weight.double(), summary.bias.double()).squeeze(-1)
