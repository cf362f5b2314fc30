"""Small models with random weights, and what their weights are."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vhead import AutoModelForCausalLMWithValueHead
from vhead.sync import Publisher


class Small(nn.Module):
    """Tensors of several dtypes, one tied, one not contiguous unless asked for, one empty, and a buffer."""

    def __init__(self, seed, *, contiguous=False):
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Linear(96, 64)
        self.half = nn.Linear(64, 7, bias=False, dtype=torch.bfloat16)
        turned = torch.randn(3, 5).t()
        self.turned = nn.Parameter(turned.contiguous() if contiguous else turned)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.tied = self.first.weight
        self.register_buffer("count", torch.randint(1000, ()))


def bits(model):
    """Every tensor's bytes."""
    tensors = model if isinstance(model, dict) else model.state_dict()
    return {
        name: (t.dtype, t.shape, bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist()))
        for name, t in tensors.items()
    }


def train(model, seed):
    """A step that changes a few elements of each tensor, as training in bfloat16 does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel():
                place = torch.randint(parameter.numel(), (3,), generator=generator)
                parameter[torch.unravel_index(place, parameter.shape)] += 1.5


def save_critic(folder, **sizes):
    """A language model of one layer and tied embeddings with a value head, random weights, in bfloat16."""
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config).to(torch.bfloat16))
    torch.nn.init.normal_(model.v_head.summary.weight)
    model.save_pretrained(folder)


@pytest.fixture
def published(tmp_path):
    """A directory with one publication, and the model that it is of."""
    model = Small(1)
    Publisher(tmp_path / "weights").publish(model, step=1)
    return tmp_path / "weights", model
