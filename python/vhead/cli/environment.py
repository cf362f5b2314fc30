"""`vhead env`: what is installed, what runs where, and what the environment asks for."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping

from vhead.cli import threads
from vhead.cli.failure import reported
from vhead.cli.terminal import show

_PACKAGES = ("vhead", "torch", "transformers", "safetensors", "numpy", "pyarrow", "peft")
_VARIABLES = (
    "VHEAD_",
    *threads.WAITING,
    *threads.COUNTING,
    "CUDA_VISIBLE_DEVICES",
    "HF_",
)


def environment() -> None:
    """Show versions, backends, threads and environment variables: what a bug report needs."""
    with reported():
        facts = list(_facts())
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            show(f"{name:<{width}}  {value}")


def _facts() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    yield from ((name, _version(name)) for name in _PACKAGES)
    yield from _torch_facts()
    yield from _backend_facts()
    yield from _scorer_facts()
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield name, f"{value} (set by vhead: {threads.reasons[name]})" if name in threads.reasons else value


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_facts() -> Iterator[tuple[str, str]]:
    import torch  # for a fast --help

    yield "cpu cores", threads.described_cores()
    yield "torch threads", str(torch.get_num_threads())
    count = torch.cuda.device_count()
    yield "cuda devices", ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"


def _backend_facts() -> Iterator[tuple[str, str]]:
    from vhead.ops import backends  # imports torch

    yield from _flat("backend", backends())


def _scorer_facts() -> Iterator[tuple[str, str]]:
    """What the installed releases lack: names that are gone, and ways of scoring that failed when they were tried."""
    from transformers.utils.logging import disable_progress_bar  # imports torch

    from vhead import Scorer, upstream  # imports torch
    from vhead.demo import demo_model_path

    missing = [name.path for name in upstream.missing_names()]
    yield "upstream names missing", ", ".join(missing) or "none"
    disable_progress_bar()
    plan = Scorer.from_pretrained(demo_model_path()).plan
    yield "scorer strategy", f"{plan.strategy}, with the bundled model"
    yield "scorer attention", str(plan.attention)
    yield from ((f"scorer not {name}", reason) for name, reason in plan.rejected.items())


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name} {key}".replace("_", " "), item)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple | set | frozenset) else str(value)
