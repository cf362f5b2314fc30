"""Folders with a tiny language model, adapters of it, and a reward adapter, as peft writes them."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.modeling.tiny_models import COMMON, build

peft = pytest.importorskip("peft")

ADAPTED = ["q_proj", "v_proj"]


@contextmanager
def peft_is_quiet():
    with warnings.catch_warnings():
        # peft reads an attribute that transformers 5 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora(**settings):
    """A configuration whose adapter is no identity: peft starts with zeros, which would hide mistakes."""
    return peft.LoraConfig(
        **{"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ADAPTED, **settings}
    )


def save_base(folder):
    build("llama").save_pretrained(folder)
    return str(folder)


def save_reward_adapter(folder, base, num_labels=2):
    """Trains nothing, but writes what training would: LoRA weights and a `score` on the base model's trunk."""
    config = AutoConfig.for_model("llama", **COMMON, num_labels=num_labels)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.model.load_state_dict(build("llama").model.state_dict())
    torch.nn.init.normal_(classifier.score.weight)
    with peft_is_quiet():
        model = peft.get_peft_model(classifier, lora(task_type="SEQ_CLS")).eval()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return model
