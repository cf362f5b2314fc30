"""Converting the folder of an adapter: its weights as they are, and the head in a file beside them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from vhead.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import AdapterError, HeadError, HeadFileError
from vhead.formats.carrying import carried, copy_files
from vhead.formats.head_settings import in_metadata
from vhead.formats.layout import Format, Sighting
from vhead.formats.streaming import Entry, write_safetensors
from vhead.formats.trl import LLAMA_FACTORY_FILES
from vhead.formats.writing import head_tensors, write_tensors
from vhead.head_weights import HeadWeights

TRL_ADAPTER_FILE = "pytorch_model.bin"

_HEAD_FILES = {"trl": TRL_ADAPTER_FILE, "llama-factory": LLAMA_FACTORY_FILES[0], "vhead": LLAMA_FACTORY_FILES[0]}

# The adapters' tasks whose models have a language-model head; an adapter need not name one.
LANGUAGE_MODEL_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")

# Those whose models have a head that reads the last hidden states, and what peft saves beside such an adapter.
CLASSIFIER_TASKS = ("SEQ_CLS", "TOKEN_CLS")
CLASSIFIER_HEADS = ("classifier", "score")


def write_adapter(
    checkpoint: Checkpoint, folder: Path, sighting: Sighting, head: HeadWeights, target: Format
) -> tuple[str, ...]:
    """Writes an adapter for a language model, and the head beside it, where the format's framework looks for it.

    Returns:
        What a user must know.

    Raises:
        HeadError: The format has no place for a head beside an adapter.
        AdapterError: A file is missing or malformed, or the adapter is for another task.
        HeadFileError: The file of weights is truncated, malformed or hostile.
    """
    source = Path(checkpoint.location)
    if target.name not in _HEAD_FILES:
        raise HeadError(
            f"{source}: format: expected one of {', '.join(_HEAD_FILES)} for a head beside an adapter, "
            f"got {target.name}"
        )
    config = _of_language_model(read_adapter_config(checkpoint), source)
    _write_weights(checkpoint, folder, sighting)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / ADAPTER_CONFIG).write_text(f"{text}\n", encoding="utf-8")
    copy_files(source, carried(source), folder)
    write_tensors(head_tensors(head, target), folder / _HEAD_FILES[target.name], in_metadata(head))
    return ()


def read_adapter_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the configuration of a checkpoint's adapter.

    Raises:
        AdapterError: It is not a JSON object.
    """
    try:
        return checkpoint.json_object(ADAPTER_CONFIG)
    except HeadFileError as error:
        raise AdapterError(str(error)) from error


def language_model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What changes in the configuration of a classifier's adapter, whose head is kept apart, for a language model."""
    saved = config.get("modules_to_save")
    others = [name for name in saved or () if name not in CLASSIFIER_HEADS]
    return {"task_type": "CAUSAL_LM", "modules_to_save": others or None}


def _of_language_model(config: dict[str, Any], source: Path) -> dict[str, Any]:
    task = config.get("task_type")
    if task in LANGUAGE_MODEL_TASKS:
        return config
    if task not in CLASSIFIER_TASKS:
        known = ", ".join([*(str(name) for name in LANGUAGE_MODEL_TASKS if name), *CLASSIFIER_TASKS])
        raise AdapterError(f"{source / ADAPTER_CONFIG}: task_type: expected one of {known}, got {task!r}")
    return {**config, **language_model_settings(config)}


def _write_weights(checkpoint: Checkpoint, folder: Path, sighting: Sighting) -> None:
    """Writes the adapter's weights, without a head among them, which would be a second one beside its own file."""
    file = next((name for name in ADAPTER_WEIGHTS if checkpoint.path(name) is not None), None)
    if file is None:
        raise AdapterError(f"{checkpoint.describe(ADAPTER_CONFIG)}: expected {' or '.join(ADAPTER_WEIGHTS)} beside it")
    kept = [name for name in checkpoint.names_in(file) if sighting.found.get(name) != file]
    entries = [Entry(name, checkpoint.info(name, file), partial(checkpoint.read, name, file)) for name in kept]
    write_safetensors(entries, folder / ADAPTER_WEIGHTS[0])
