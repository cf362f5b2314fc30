"""A checkpoint of any framework that has a language model gives that framework's values, or says how to convert it."""

import pytest
import torch
from golden import EXPECTED, TOKENS, WITH_BODY, location

from vhead import AutoModelForCausalLMWithValueHead

PREFIXED = [name for name in WITH_BODY if EXPECTED[name]["body_prefix"]]


def values_of(path, transformers_dtype):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(path, **transformers_dtype)
    with torch.no_grad():
        return model, model.values(TOKENS)


def framework_values(name):
    """Values `[B, T]`, or `[B, T, K]` of several outputs, as the framework's own rule gave them."""
    values = torch.tensor(EXPECTED[name]["values"])
    return values.squeeze(-1) if values.shape[-1] == 1 else values


@pytest.mark.parametrize("name", [name for name in WITH_BODY if name not in PREFIXED])
def test_values_are_the_framework_s(name):
    model, values = values_of(location(name), {"torch_dtype": torch.float32})
    expected = framework_values(name)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01, "values that are all alike would prove nothing"
    assert EXPECTED[name]["format"] in model.head_source
    assert not model.training
