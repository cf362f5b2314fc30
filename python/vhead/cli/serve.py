"""`vhead serve`: scores over HTTP."""

import logging
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vhead.cli import score_options as option
from vhead.cli.failure import FAILED, reported
from vhead.cli.model_runs import loading_shown
from vhead.cli.signals import answered_by
from vhead.cli.terminal import say
from vhead.errors import MissingExtraError

if TYPE_CHECKING:
    from vhead.scoring.scorer import Scorer
    from vhead.serve.batching import QueueLimits
    from vhead.serve.limits import RequestLimits
    from vhead.serve.running import Address
    from vhead.serve.service import Service

_OPTIONAL = ("fastapi", "uvicorn", "starlette", "prometheus_client", "msgspec", "orjson")
_MEBIBYTE = 2**20
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What no repository's name ends with.
_ENDINGS_OF_HEADS = (".safetensors", ".bin", ".pt", ".pth")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model with a trained value head.")]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen. 0.0.0.0 listens on every interface.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0 takes any port that is free.")]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What clients call the model. Default: MODEL. Give the option again for more than one.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="What clients have to send as `Authorization: Bearer KEY`. Better in the environment, as VHEAD_API_KEY.",
    ),
]
AllowUnauthenticated = Annotated[
    bool, typer.Option("--allow-unauthenticated", help="Let other machines in without a key.")
]
Certificate = Annotated[
    Path | None, typer.Option("--ssl-certfile", metavar="FILE", help="A certificate, to serve HTTPS.")
]
PrivateKey = Annotated[
    Path | None, typer.Option("--ssl-keyfile", metavar="FILE", help="The certificate's key, if it is another file.")
]
MaxWait = Annotated[
    float, typer.Option("--max-wait-ms", min=0, metavar="MS", help="How long an idle server waits for a fuller batch.")
]
QueuedRequests = Annotated[
    int, typer.Option("--max-num-queued-reqs", min=1, metavar="N", help="Requests that may wait; more get 503.")
]
QueuedTokens = Annotated[
    int,
    typer.Option(
        "--max-num-queued-tokens", min=1, metavar="N", help="Tokens that may wait, with candidates; more get 503."
    ),
]
BatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens", min=1, metavar="N", help="Tokens of a batch. Default: four times the token budget."
    ),
]
BodySize = Annotated[
    float, typer.Option("--max-body-mib", min=0.001, metavar="MIB", help="Most MiB of a request's body.")
]
RequestRollouts = Annotated[
    int, typer.Option("--max-request-rollouts", min=1, metavar="N", help="Most rollouts of a request.")
]
RequestTokens = Annotated[
    int, typer.Option("--max-request-tokens", min=1, metavar="N", help="Most tokens of a request.")
]
BodyTimeout = Annotated[
    float, typer.Option("--body-timeout", min=0.001, metavar="S", help="Seconds for a body to arrive.")
]
RequestTimeout = Annotated[
    float, typer.Option("--request-timeout", min=0.001, metavar="S", help="Seconds for scores to be computed.")
]
DrainTimeout = Annotated[
    int, typer.Option("--drain-timeout", min=1, metavar="S", help="Seconds for accepted requests when it stops.")
]
Follow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Take over the weights that a trainer publishes there, between two batches. NAME=DIRECTORY is for another "
        "model.",
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME=PATH",
        help="Serve one more model under a name, which requests give as their model. A file is a head on MODEL. Give "
        "the option again for more.",
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", metavar="STEP", help="The weights' training step, which answers then state.")
]


def serve(
    model: Model,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Names = None,
    api_key: ApiKey = None,
    allow_unauthenticated: AllowUnauthenticated = False,
    ssl_certfile: Certificate = None,
    ssl_keyfile: PrivateKey = None,
    max_wait_ms: MaxWait = 2.0,
    max_num_queued_reqs: QueuedRequests = 1024,
    max_num_queued_tokens: QueuedTokens = 1_048_576,
    max_num_batched_tokens: BatchedTokens = None,
    max_body_mib: BodySize = 32.0,
    max_request_rollouts: RequestRollouts = 4096,
    max_request_tokens: RequestTokens = 262_144,
    body_timeout: BodyTimeout = 30.0,
    request_timeout: RequestTimeout = 600.0,
    drain_timeout: DrainTimeout = 60,
    step: Step = None,
    other_models: Others = None,
    follow: Follow = None,
    head: option.Head = None,
    step_separator: option.StepSeparator = None,
    dtype: option.ModelDtype = None,
    device: option.Device = None,
    token_budget: option.TokenBudget = None,
    num_threads: option.NumThreads = None,
    attention: option.AttentionOption = None,
    batch_invariant: option.BatchInvariant = False,
    normalize_rewards: option.NormalizeRewards = False,
    allow_random_head: option.AllowRandomHead = False,
    trust_remote_code: option.TrustRemoteCode = False,
    truncate: option.TruncateOption = option.Truncate.ERROR,
    max_length: option.MaxLength = None,
    separate_tokens: option.SeparateTokens = False,
    append_eos: option.AppendEos = False,
    quiet: option.Quiet = False,
) -> None:
    """Serve scores over HTTP, in the protocols that reward clients speak.

    POST /score takes rollouts. /classify, /pooling and /v1/embeddings answer clients of vLLM and verl, /get_reward
    those of OpenRLHF, and /v1/score/evaluation those of LLaMA-Factory. The server listens on this machine alone, unless
    you give another address and a key. On SIGTERM and Ctrl-C it answers what it has accepted, and ends.

    Exit codes: 0 done, 1 failed, or accepted requests were not answered, 2 wrong usage.

    **Examples**

    - `vhead serve ./critic`
    - `VHEAD_API_KEY=... vhead serve ./critic --host 0.0.0.0 --port 8080`
    - `vhead serve ./critic --follow ./weights --model safety=./v_head.safetensors --model large=./other-critic`
    """
    given = {name: value.value if isinstance(value, StrEnum) else value for name, value in locals().items()}
    with reported():
        _check_extra()
        address = _address(given)
        if not _run(given, address):
            # A batch may still be computed, and torch ends a process badly whose threads it still uses.
            sys.stderr.flush()
            os._exit(FAILED)


def _check_extra() -> None:
    import importlib.util

    for package in _OPTIONAL:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "serve")


def _address(given: dict[str, Any]) -> "Address":
    from vhead import env  # imports the extension
    from vhead.serve.running import Address  # for a fast --help

    key = given["api_key"] or env.api_key()
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
        raise typer.BadParameter("expected printable ASCII without spaces around it", param_hint="--api-key")
    if given["ssl_keyfile"] is not None and given["ssl_certfile"] is None:
        raise typer.BadParameter("expected a certificate with the key", param_hint="--ssl-certfile")
    address = Address(given["host"], given["port"], key, given["ssl_certfile"], given["ssl_keyfile"])
    if not address.is_loopback and key is None and not given["allow_unauthenticated"]:
        raise typer.BadParameter(
            f"{address.host} lets other machines in: give a key (--api-key or VHEAD_API_KEY), or allow it without one "
            "(--allow-unauthenticated)",
            param_hint="--host",
        )
    return address


def _run(given: dict[str, Any], address: "Address") -> bool:
    from vhead.serve.running import Server  # for a fast --help
    from vhead.serve.service import Service  # for a fast --help
    from vhead.serve.tracing import from_environment as tracing_from_environment  # for a fast --help

    names = given["served_model_name"] or [given["model"]]
    others, follow, tracing = _others(given, names), _follow(given), tracing_from_environment()
    # The address is taken before a model is loaded for minutes.
    with address.bound() as bound:
        quiet = given["quiet"]
        with loading_shown(given["model"], shown=sys.stderr.isatty() and not quiet, quiet=quiet):
            scorer = _scorer(given)
        queue, limits = _limits(given, scorer)
        service = Service(
            scorer, names, queue=queue, limits=limits, step=given["step"], follow=follow.pop("", None), tracing=tracing
        )
        for name, path in others.items():
            _add(service, name, path, given, follow.pop(name, None))
        server = Server(service, address, bound, given["drain_timeout"])
        with answered_by(server.stop):
            _start_log(quiet=quiet)
            say(f"serving {names[0]} on {address.url(bound)}")
            done = server.run()
    say(
        "stopped; every accepted request was answered" if done else "stopped before every accepted request was answered"
    )
    return done


def _others(given: dict[str, Any], names: list[str]) -> dict[str, str]:
    """The paths of the other models by their names."""
    others: dict[str, str] = {}
    for entry in given["other_models"] or []:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"expected NAME=PATH, got {entry!r}", param_hint="--model")
        if name in others or name in names:
            raise typer.BadParameter(f"expected another name for each model, got {name!r} twice", param_hint="--model")
        if not (Path(path).exists() or _may_be_on_the_hub(path)):
            raise typer.BadParameter(
                f"{name}: expected a head's file, a model's folder or a hub id, but there is nothing at {path}",
                param_hint="--model",
            )
        others[name] = path
    return others


def _may_be_on_the_hub(path: str) -> bool:
    """Whether a path that is not on this machine has the form of a hub id, and not the ending of a head's file."""
    return _HUB_ID.fullmatch(path) is not None and not path.endswith(_ENDINGS_OF_HEADS)


def _follow(given: dict[str, Any]) -> dict[str, str]:
    """The directories that are followed, by the models' names; that of MODEL by an empty one."""
    others = {entry.partition("=")[0] for entry in given["other_models"] or []}
    follow: dict[str, str] = {}
    for entry in given["follow"] or []:
        name, equals, directory = entry.partition("=")
        name, directory = (name, directory) if equals and name in others else ("", entry)
        if name in follow:
            raise typer.BadParameter(f"expected one directory for each model, got {entry!r} too", param_hint="--follow")
        follow[name] = directory
    return follow


def _add(service: "Service", name: str, path: str, given: dict[str, Any], follow: str | None) -> None:
    """Serves another model, or another head of the first one."""
    from vhead.serve.models import scorer_with_head  # imports torch

    if not Path(path).is_file():
        service.add(_scorer({**given, "model": path, "head": None}), [name], follow=follow)
        return
    if follow is not None:
        raise typer.BadParameter(f"{name} is a head, and follows what its model follows", param_hint="--follow")
    first = service.model()
    service.add(scorer_with_head(first.scorer, path), [name], weights=first.weights)


def _start_log(*, quiet: bool) -> None:
    from vhead.serve.running import JsonLines  # for a fast --help

    logger = logging.getLogger("vhead.serve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def _limits(given: dict[str, Any], scorer: "Scorer") -> "tuple[QueueLimits, RequestLimits]":
    from vhead.serve.batching import QueueLimits  # imports numpy
    from vhead.serve.limits import RequestLimits  # for a fast --help
    from vhead.serve.service import batch_tokens  # imports torch

    queue = QueueLimits(
        requests=given["max_num_queued_reqs"],
        tokens=given["max_num_queued_tokens"],
        batch_tokens=given["max_num_batched_tokens"] or batch_tokens(scorer),
        max_wait_s=given["max_wait_ms"] / 1000,
    )
    size = int(given["max_body_mib"] * _MEBIBYTE)
    limits = RequestLimits(
        body_bytes=size,
        bodies_bytes=4 * size,
        rollouts=given["max_request_rollouts"],
        tokens=given["max_request_tokens"],
        body_s=given["body_timeout"],
        answer_s=given["request_timeout"],
    )
    return queue, limits


def _scorer(given: dict[str, Any]) -> "Scorer":
    from vhead.scoring.conventions import Conventions  # imports numpy
    from vhead.scoring.options import ScorerOptions  # imports numpy
    from vhead.scoring.scorer import Scorer  # imports torch

    # Following is the server's own: its operators can go back.
    names = ScorerOptions.__annotations__.keys() & given.keys() - {"follow"}
    options: Any = {name: given[name] for name in names}
    options["truncation"] = None if given["truncate"] == option.Truncate.ERROR else given["truncate"]
    options["conventions"] = Conventions(step_separator=given["step_separator"])
    return Scorer.from_pretrained(given["model"], **{name: given[name] for name in option.LOADING}, **options)
