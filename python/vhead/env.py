"""Every environment variable that the package reads, in one place.

| variable | meaning |
|---|---|
| `VHEAD_PLAIN_TORCH` | `1`: run everything through plain torch operations, never through a native kernel |
| `VHEAD_NUM_THREADS` | threads of the native CPU kernels, 1 to 1024; unset: as many as torch has been told to use |
| `VHEAD_ALLOW_PICKLE` | `1`: read pickled checkpoints also on torch before 2.6, where such a file can run code |
| `VHEAD_TENSOR_VIEW` | `attributes`: read tensors by their Python attributes even where torch offers DLPack's C table |
| `VHEAD_TOKEN_BUDGET` | tokens of a scorer's batch where none are asked for; unset: the fastest on the machine |
| `VHEAD_API_KEY` | what clients of `vhead serve` have to send as a bearer token; unset or empty: nothing |

They are read once, when `vhead.ops` is imported; `VHEAD_ALLOW_PICKLE` whenever a pickled file is opened,
`VHEAD_TOKEN_BUDGET` when a scorer is made, and `VHEAD_API_KEY` when a server starts.
The commands also set variables of OpenMP: see `vhead.cli.threads`.
"""

import os
import re
from dataclasses import dataclass

from vhead import _native
from vhead.errors import EnvironmentVariableError

# Starting more of them fails, on many systems by ending the process. The extension has the same limit.
MOST_THREADS = 1024


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    plain_torch: bool
    num_threads: int | None
    tensor_view: str


def read_settings() -> Settings:
    """Reads the environment.

    Raises:
        EnvironmentVariableError: A variable has a value that is not in the table above.
    """
    return Settings(
        plain_torch=_choice("VHEAD_PLAIN_TORCH", ("0", "1")) == "1",
        num_threads=_thread_count("VHEAD_NUM_THREADS"),
        tensor_view=_choice("VHEAD_TENSOR_VIEW", ("exchange", "attributes")),
    )


def allows_pickle() -> bool:
    """Whether the user trusts pickled files whatever the release of torch.

    Raises:
        EnvironmentVariableError: `VHEAD_ALLOW_PICKLE` is neither 0 nor 1.
    """
    return _choice("VHEAD_ALLOW_PICKLE", ("0", "1")) == "1"


def token_budget() -> int | None:
    """How many tokens a scorer's batch has where none are asked for; None: that is not said.

    Raises:
        EnvironmentVariableError: `VHEAD_TOKEN_BUDGET` is no whole number from 1 on.
    """
    value = os.environ.get("VHEAD_TOKEN_BUDGET")
    if not value:
        return None
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", value) is None:
        raise EnvironmentVariableError(f"VHEAD_TOKEN_BUDGET: expected a whole number from 1 on, got {value!r}")
    return int(value)


def api_key() -> str | None:
    """The key of a server, where the environment has one."""
    return os.environ.get("VHEAD_API_KEY") or None


def available_cores() -> int:
    """The cores that this process may use: what affinity and the quota of its control group leave, at least 1."""
    return _native.available_cores()


def _choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise EnvironmentVariableError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def _thread_count(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if re.fullmatch(r"0*[1-9][0-9]{0,3}", value) is None or int(value) > MOST_THREADS:
        raise EnvironmentVariableError(f"{name}: expected an integer from 1 to {MOST_THREADS}, got {value!r}")
    return int(value)
