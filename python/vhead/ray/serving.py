"""The server of `vhead serve` as an application of Ray Serve."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vhead.errors import MissingExtraError

# Of requests beyond its own queue the server itself says no, with the time after which there is room; Ray's proxy would
# let them wait. So Ray hands on more than the queue holds.
_ONGOING_REQUESTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """What `build_app` takes."""

    model: str
    served_model_names: Sequence[str] = ()
    api_key: str | None = field(default=None, repr=False)
    scorer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    deployment_options: Mapping[str, Any] = field(default_factory=dict)


def build_app(arguments: Mapping[str, Any]) -> Any:
    """An application for `ray.serve.run`, or for Ray Serve's configuration files as `vhead.ray:build_app`.

    Every replica loads the model and has the routes, the limits and the batches of `vhead serve`.

    Args:
        arguments: `model`, a folder that every machine has or a hub repository's id; and where they are wanted,
            `served_model_names`, what clients may call it; `api_key`, what they have to send; `scorer_kwargs`, the
            arguments of `Scorer.from_pretrained`; `deployment_options`, those of `ray.serve.deployment`, such as
            `{"num_replicas": 2, "ray_actor_options": {"num_gpus": 1}}`.

    Returns:
        A `ray.serve.Application`.

    Raises:
        MissingExtraError: Ray is not installed, or what the server needs.
        ValueError: There is no such argument, or `model` is missing.
    """
    known = _Arguments.__dataclass_fields__.keys()
    if "model" not in arguments or arguments.keys() - known:
        got = ", ".join(map(str, arguments)) or "none"
        raise ValueError(f"arguments: expected model, and some of {', '.join(list(known)[1:])}, got {got}")
    given = _Arguments(**arguments)
    serve = _required("ray.serve", "ray", "ray")
    _required("fastapi", "fastapi", "serve")
    options = {"name": "vhead", "max_ongoing_requests": _ONGOING_REQUESTS, **given.deployment_options}
    return serve.deployment(**options)(serve.ingress(lambda: _app_of(given))()).bind()


def _app_of(given: _Arguments) -> Any:
    """The ASGI application of one replica."""
    from vhead.scoring.scorer import Scorer  # imports torch, which the machine that builds need not have
    from vhead.serve.app import make_app  # imports fastapi
    from vhead.serve.service import Service  # imports torch

    scorer = Scorer.from_pretrained(given.model, **given.scorer_kwargs)
    return make_app(Service(scorer, given.served_model_names or [given.model]), given.api_key)


def _required(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error
