"""What older releases of torch, transformers and numpy name otherwise or lack: one suite runs on all of them."""

import importlib.util
from inspect import signature

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch.distributed.checkpoint import state_dict
from transformers import CONFIG_MAPPING
from transformers.utils import import_utils

TRANSFORMERS = Version(transformers.__version__)

# The argument of `from_config` and `from_pretrained`.
DTYPE = "dtype" if Version("4.56") <= TRANSFORMERS else "torch_dtype"

# Keeps the dtype of the checkpoint, as transformers does unasked since version 5.
CHECKPOINT_DTYPE = {} if Version("5") <= TRANSFORMERS else {DTYPE: "auto"}

# What was found to fail on 4.45 and to hold on 4.57.
IS_BEFORE_4_57 = Version("4.57") > TRANSFORMERS

# Whether plain FSMT works: in 4.57 it raises with a cache, and generates by other logits than its forward gives.
HAS_FSMT = not Version("4.57") <= TRANSFORMERS < Version("5")

# Whether plain Llama can be traced without a break: the masks of 4.57 need a newer torch.
TRACES_WHOLE_MODELS = Version("2.5") <= Version(torch.__version__) or IS_BEFORE_4_57

# Whether plain Llama continues from a cache: the same masks of 4.57 raise with an older torch.
CONTINUES_FROM_CACHES = TRACES_WHOLE_MODELS

# Whether transformers reads pickled checkpoints: newer ones refuse with a torch before 2.6.
READS_PICKLES = Version("2.6") <= Version(torch.__version__) or not hasattr(import_utils, "check_torch_load_is_safe")

# Whether tensors and arrays can be asked for a versioned DLPack capsule.
TORCH_VERSIONS_DLPACK = "max_version" in signature(torch.Tensor.__dlpack__).parameters
NUMPY_VERSIONS_DLPACK = Version("2.1") <= Version(np.__version__)

# Whether `torch.distributed.checkpoint` lets a module say which child its names leave out.
TORCH_ASKS_FOR_NAMES = "dsd_fqn_modifiers" in signature(state_dict._get_fqns).parameters

# Whether models can be asked for one hidden state instead of all.
SELECTS_HIDDEN_STATES = importlib.util.find_spec("transformers.utils.output_capturing") is not None


# The first releases in which plain models of these types run on batches of any size and length, and give a row what it
# gets alone: before them, RecurrentGemma and xLSTM raise, Qwen2-VL finds no positions, and Mamba-2 looks at the length.
RUN_IN_BATCHES = {"recurrent_gemma": "5", "xlstm": "5", "qwen2_vl": "5", "mamba2": "4.57"}


def need_architecture(name: str) -> None:
    """Skips the test where this transformers is older than a model type."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {TRANSFORMERS} has no {name}")


def need_batches(name: str) -> None:
    """Skips the test where this transformers cannot run a model type on any batch."""
    need_architecture(name)
    if Version(RUN_IN_BATCHES.get(name, "0")) > TRANSFORMERS:
        pytest.skip(f"transformers {TRANSFORMERS} does not run every batch of {name}")
