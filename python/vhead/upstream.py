"""What other packages call things, and in which of their releases: the one place that follows them when they rename.

transformers 5.24 calls a model's cache `cache`, which was `past_key_values` before, and `cache_params` in some models.
Nobody else in the package knows these names: callers say "the cache", and this module says what it is called here.

`NAMES` lists every private, deprecated or new name of another package that vhead leans on. A test compares it with the
sources and with the installed releases, and `vhead env` prints what is missing.
"""

import importlib
import importlib.metadata
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import nn

logger = logging.getLogger("vhead")


def release(package: str) -> tuple[int, ...]:
    """The numbers of an installed package's release, `(5, 24, 0)`; those of a package that is absent are `()`."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


_TRANSFORMERS = release("transformers")

# The argument by which transformers' loaders take a dtype.
DTYPE = "dtype" if _TRANSFORMERS >= (4, 56) else "torch_dtype"

# A cache's names, from the newest on, as arguments and in outputs; and the one that this release uses itself.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = "cache" if _TRANSFORMERS >= (5, 24) else "past_key_values"


def cache_argument(model: nn.Module) -> str | None:
    """The argument by which a model takes a cache, or None for a model that takes none.

    Code that comes with a checkpoint keeps the name that it was written with, whatever transformers' own models use.
    """
    parameters = signature(model.forward).parameters
    named = next((name for name in CACHE_NAMES if name in parameters), None)
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    return named or (CACHE if takes_any else None)


def with_cache_as(argument: str | None, inputs: Mapping[str, object]) -> dict[str, object]:
    """A model's inputs, with a cache that came by any of its names under the one that the model takes."""
    others = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    given = [value for name in CACHE_NAMES if (value := inputs.get(name)) is not None]
    # A model that takes no cache gets it all the same, so that the model itself says so.
    return dict(inputs) if not given or argument is None else {**others, argument: given[0]}


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache that a model returned, or None."""
    return next((output[name] for name in CACHE_NAMES if name in tuple(output)), None)


def empty_cache(model: Any) -> Any:
    """An empty cache of the kinds of layers that a model has."""
    from transformers import DynamicCache  # slow, and only needed with a model at hand

    # Before 4.56 it took no configuration, as there was a class for each kind of layer.
    return DynamicCache(config=model.config) if _TRANSFORMERS >= (4, 56) else DynamicCache()


@dataclass(frozen=True)
class Name:
    """A name of another package that is private, deprecated or newer than the oldest release that vhead takes.

    Attributes:
        path: Dotted. `()` behind a class stands for an instance of it.
        used_for: What vhead does with it.
        since: The first release that has it; None: all that vhead takes.
        until: The first release without it; None: there is none yet.
    """

    path: str
    used_for: str
    since: tuple[int, ...] | None = None
    until: tuple[int, ...] | None = None

    @property
    def package(self) -> str:
        """The package's name."""
        return self.path.partition(".")[0]

    def is_expected(self) -> bool:
        """Whether the installed release should have it."""
        installed = release(self.package)
        starts, ends = self.since or (), self.until
        return bool(installed) and starts <= installed and (ends is None or installed < ends)

    def exists(self) -> bool:
        """Whether the installed release has it."""
        return _resolves(self.path)


NAMES = (
    # torch: what a call is part of, so that kernels are left out of what they cannot serve.
    Name("torch._C._len_torch_dispatch_stack", "seeing that a dispatch mode watches"),
    Name("torch._C._functorch.peek_interpreter_stack", "seeing that a transform of torch.func runs"),
    Name("torch._C._get_tracing_state", "seeing that torch.jit traces"),
    Name("torch._subclasses.fake_tensor.FakeTensor", "seeing that a tensor has no data"),
    Name("torch._subclasses.functional_tensor.FunctionalTensor", "seeing that a tensor has no data"),
    Name("torch.autograd.forward_ad._current_level", "seeing that forward-mode derivatives are taken"),
    Name("torch._assert_async", "checking token ids on CUDA without waiting for it"),
    Name("torch.library.register_vmap", "batching the operators", since=(2, 5)),
    Name("torch.distributed._tensor", "finding DTensor before torch 2.5 moved it"),
    Name("torch.nn.attention.flex_attention.flex_attention", "attention in packed trees", since=(2, 5)),
    Name("torch.nn.attention.flex_attention.BlockMask", "attention in packed trees", since=(2, 5)),
    Name("torch.nn.attention.flex_attention.BlockMask.from_kv_blocks", "attention in packed trees", since=(2, 5)),
    Name("torch.nn.Module()._modules", "walking a model without calling properties"),
    Name("torch.nn.Module()._parameters", "walking a model without calling properties"),
    Name("torch.nn.Module()._buffers", "walking a model without calling properties"),
    Name("torch.nn.Module()._forward_hooks", "seeing that somebody watches a layer, which then runs as it is"),
    Name("torch.nn.Module()._forward_pre_hooks", "seeing that somebody watches a layer, which then runs as it is"),
    Name("torch.nn.Module()._backward_hooks", "seeing that somebody watches a layer, which then runs as it is"),
    Name("torch.nn.Module()._backward_pre_hooks", "seeing that somebody watches a layer, which then runs as it is"),
    Name("torch.Tensor()._backward_hooks", "seeing that somebody waits for a gradient that autograd does not make"),
    Name(
        "torch.Tensor()._post_accumulate_grad_hooks",
        "seeing that somebody waits for a gradient that autograd does not make",
    ),
    # transformers
    Name("transformers.PretrainedConfig()._attn_implementation", "choosing how a model attends"),
    Name("transformers.PretrainedConfig()._attn_implementation_internal", "choosing how a model attends"),
    Name(
        "transformers.GenerationMixin._prepare_generation_config",
        "knowing the tokens that end a generated row",
    ),
    Name("transformers.AutoModelForCausalLM._model_mapping._model_mapping", "finding a model type's classes"),
    Name("transformers.PreTrainedModel._keys_to_ignore_on_load_missing", "telling layers that may be missing"),
    Name("transformers.PreTrainedModel._tied_weights_keys", "naming tied weights in vhead.pretrained"),
    Name(
        "transformers.PreTrainedModel._can_record_outputs",
        "keeping only the last hidden state under torch.compile",
        since=(4, 54),
    ),
    Name(
        "transformers.utils.output_capturing.selected_hidden_states",
        "keeping only the last hidden state under torch.compile",
        since=(5, 23),
    ),
    Name(
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
        "packing rollouts by segments",
        since=(4, 48),
    ),
    Name(
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.__setitem__",
        "packing rollouts by segments",
        since=(4, 48),
    ),
    Name("transformers.PreTrainedModel.is_activation_checkpointing", "saying if checkpointing is on", since=(5, 23)),
    Name("transformers.PreTrainedModel.is_gradient_checkpointing", "saying if checkpointing is on", until=(6,)),
    # rich
    Name("rich._export_format.CONSOLE_SVG_FORMAT", "drawing the demo's picture"),
)


def missing_names() -> Iterator[Name]:
    """The names of `NAMES` that the installed releases should have, and have not."""
    return (name for name in NAMES if name.is_expected() and not name.exists())


def available(path: str) -> bool:
    """Whether the installed release has one of `NAMES`; where it should and has not, the log says so once."""
    name = next(name for name in NAMES if name.path == path)
    if name.exists():
        return True
    if name.is_expected():
        installed = importlib.metadata.version(name.package)
        warn_once(
            f"{name.package} {installed} has no {path}, which vhead uses for {name.used_for}; vhead goes on without it"
        )
    return False


@cache
def warn_once(message: str) -> None:
    """Logs a warning the first time that it is given."""
    logger.warning(message)


def _resolves(path: str) -> bool:
    """Whether a dotted path leads somewhere: through modules as far as there are any, then through attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return _has(found, parts[length:])
    return False


def _has(found: Any, attributes: list[str]) -> bool:
    for attribute in attributes:
        name = attribute.removesuffix("()")
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
        if name != attribute:
            found = found()
    return True
