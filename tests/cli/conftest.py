"""A critic on disk with a byte-level tokenizer, and a file of rollouts for it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from vhead import AutoModelForCausalLMWithValueHead

RECORDS = 12


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a head."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("plain")
    llama().save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a trained head."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("critic")
    AutoModelForCausalLMWithValueHead(llama(), v_head_init_strategy="normal").save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture
def records() -> list[dict[str, object]]:
    """Rollouts of many lengths, not in their order, with a column that scoring knows nothing about."""
    lengths = [(7 * index) % RECORDS + 1 for index in range(RECORDS)]
    return [
        {"id": f"r{index}", "prompt": "Question? " * (1 + index % 3), "completion": "yes " * length, "tag": [index]}
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def source(tmp_path: Path, records: list[dict[str, object]]) -> Path:
    """The records as JSON Lines."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def vhead() -> list[str]:
    """The command, for a process of its own."""
    return [sys.executable, "-m", "vhead"]
