"""The model that the consumers' demands are made on."""

import pytest
import torch

from tests.consumers.critics import VOCABULARY, language_model
from vhead import AutoModelForCausalLMWithValueHead


@pytest.fixture
def body():
    return language_model()


@pytest.fixture
def model(body):
    """As every consumer makes it: from a loaded object, the head with random weights and bias."""
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    torch.nn.init.normal_(wrapped.v_head.summary.bias)
    return wrapped


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
