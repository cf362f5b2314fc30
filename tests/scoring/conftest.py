"""A critic on disk, with a byte-level tokenizer that needs no vocabulary file."""

import logging
from pathlib import Path

import pytest
import transformers
from transformers import ByT5Tokenizer

from tests.scoring.scoring_models import critic

BYTES = 259
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def critic_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A trained head, saved with its model and tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("critic")
    critic(vocab_size=BYTES, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A language model without a head."""
    folder = tmp_path_factory.mktemp("plain")
    critic(vocab_size=BYTES, max_position_embeddings=128).pretrained_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
