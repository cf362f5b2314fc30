"""A task that a tiny byte-level language model learns in a few PPO steps: write ASCII."""

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

# ByT5's tokens: 3 special ones, 256 bytes, 125 sentinels.
ASCII = (3, 3 + 127)
PROMPTS = ["In ASCII: ", "Plain text, please: ", "No accents: ", "Seven bits: "]


def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(padding_side="left")


def language_model(*, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    """The same random weights every time; tied embeddings are what trips up careless savers."""
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.tie_weights()
    return model


def share_of_ascii(tokens: Tensor) -> Tensor:
    """The share of ASCII characters in tokens `[..., T]`, float32 `[...]`."""
    first, last = ASCII
    return ((tokens >= first) & (tokens <= last)).float().mean(-1)


class AsciiReward(nn.Module):
    """What TRL 1.12 takes for a reward model: a trunk, named by `base_model_prefix`, and a `score` of its states."""

    base_model_prefix = "trunk"

    def __init__(self, response_length: int) -> None:
        super().__init__()
        self.trunk = _LastTokens(response_length)
        self.score = nn.Identity()


class _LastTokens(nn.Module):
    def __init__(self, response_length: int) -> None:
        super().__init__()
        self.response_length = response_length

    def forward(self, input_ids: Tensor, **_: object) -> "_LastTokens.Output":
        share = share_of_ascii(input_ids[:, -self.response_length :])
        return self.Output((share[:, None, None].expand(-1, input_ids.shape[1], 1),))

    class Output:
        def __init__(self, hidden_states: tuple[Tensor, ...]) -> None:
            self.hidden_states = hidden_states
