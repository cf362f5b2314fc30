"""`python -m vhead.compat.trl` runs a program as python does, and worker processes have the names too."""

import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from vhead.compat.trl.__main__ import interpreter_options
from vhead.compat.trl.workers import FOLDER

Python = Callable[..., subprocess.CompletedProcess[str]]
RUNNER = ("-m", "vhead.compat.trl")

SCRIPT = """\
import sys
import trl.models.modeling_value_head as found

print(__name__, __file__, sys.argv, sys.path[0], found.__all__[1], sys.flags.dont_write_bytecode)
if sys.argv[1:] == ["fail"]:
    def inner():
        raise LookupError("lost")
    inner()
sys.exit(int(sys.argv[1]))
"""

# The same script, for plain python where no trl is needed.
PLAIN = SCRIPT.replace("import trl.models.modeling_value_head as found", "found = type(sys)('')").replace(
    "\n\n", "; found.__all__ = ['', 'AutoModelForCausalLMWithValueHead']\n\n", 1
)


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [["3", "--flag", "a b"], ["fail"]])
@pytest.mark.parametrize("way", [["program.py"], ["-m", "program"], ["-B", "program.py"]])
def test_a_program_runs_as_in_plain_python(python: Python, tmp_path: Path, way: list[str], words: list[str]) -> None:
    (tmp_path / "program.py").write_text(PLAIN)
    plain = python(*way, *words)
    (tmp_path / "program.py").write_text(SCRIPT)
    done = python(*RUNNER, *way, *words)
    assert outcome(done) == outcome(plain)
    assert plain.returncode == (1 if words == ["fail"] else 3)


def test_without_the_runner_the_program_fails(python: Python, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    assert "No module named 'trl'" in python("program.py", "0").stderr


def test_options_of_the_interpreter_are_kept(python: Python) -> None:
    code = "import sys; print(sys.flags.dont_write_bytecode, sys.flags.utf8_mode, sys.argv, 'trl' in sys.modules)"
    done = python("-B", "-X", "utf8", *RUNNER, "-c", code, "x")
    assert outcome(done) == (0, "1 1 ['-c', 'x'] False\n", "")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["-m", "vhead.compat.trl"], []),
        (["-mvhead.compat.trl"], []),
        (["-Bm", "vhead.compat.trl"], ["-B"]),
        (["-W", "error", "-m", "vhead.compat.trl"], ["-W", "error"]),
        (["-u", "-Bmvhead.compat.trl"], ["-u", "-B"]),
        (["-u", "/site-packages/vhead/compat/trl"], ["-u"]),
    ],
)
def test_how_the_runner_was_named_is_not_passed_on(words: list[str], options: list[str]) -> None:
    assert interpreter_options(words) == options


def test_usage(python: Python) -> None:
    nothing, asked = python(*RUNNER), python(*RUNNER, "--help")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("usage: python -m vhead.compat.trl")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, nothing.stderr, "")


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_an_interpreter_that_ignores_the_environment_is_refused(python: Python, option: str) -> None:
    done = python(option, *RUNNER, "-c", "pass")
    assert done.returncode == 2
    assert "call vhead.compat.trl.install() there instead" in done.stderr


WORKERS = """\
import importlib.util, multiprocessing, subprocess, sys


def name(queue):
    from vhead.compat.trl import status
    import trl.experimental.ppo
    queue.put((trl.experimental.ppo.__all__[0][:9], status().installed, "torch" in sys.modules))


if __name__ == "__main__":
    {install}
    for method in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=name, args=(queue,))
        worker.start()
        print(method, queue.get(timeout=60))
        worker.join()
    code = "import trl, sys; print('subprocess', trl.__file__.endswith('stand_in.py'))"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout, end="")
"""
WORKED = "".join(f"{method} ('AutoModel', True, False)\n" for method in ("spawn", "forkserver", "fork"))


@pytest.mark.parametrize(
    ("runner", "install"),
    [(RUNNER, "pass"), ((), "from vhead.compat.trl import install; install()")],
    ids=["runner", "install"],
)
def test_workers_have_the_names_and_no_torch(
    python: Python, tmp_path: Path, runner: tuple[str, ...], install: str
) -> None:
    (tmp_path / "program.py").write_text(WORKERS.format(install=install))
    assert outcome(python(*runner, "program.py")) == (0, f"{WORKED}subprocess True\n", "")


def test_a_worker_s_path_and_sitecustomize_are_as_without(python: Python) -> None:
    code = "import sys; print(sys.path, sys.modules['sitecustomize'].__file__)"
    assert python(*RUNNER, "-c", code).stdout == python("-c", code).stdout


def test_an_interpreter_without_vhead_is_left_alone(python: Python, tmp_path: Path) -> None:
    (tmp_path / "vhead.py").write_text("raise ModuleNotFoundError(\"No module named 'vhead'\", name='vhead')\n")
    done = python("-c", "print(1)", PYTHONPATH=f"{FOLDER}{os.pathsep}{tmp_path}")
    assert outcome(done) == (0, "1\n", "")


def _has_experimental_ppo() -> bool:
    """Whether the trl that is installed has its trainer there, which few releases do."""
    try:
        files = metadata.files("trl") or ()
    except metadata.PackageNotFoundError:
        return False
    return any(file.as_posix() == "trl/experimental/ppo/ppo_trainer.py" for file in files)


HAS_EXPERIMENTAL_PPO = _has_experimental_ppo()

REAL = """\
import multiprocessing, sys, warnings
warnings.simplefilter("ignore")
from torch.utils.data import DataLoader, Dataset
from trl import AutoModelForCausalLMWithValueHead
from trl.experimental.ppo import PreTrainedModelWrapper, PPOTrainer
import vhead


class Modules(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        from trl import AutoModelForCausalLMWithValueHead as model
        return model.__module__


if __name__ == "__main__":
    assert AutoModelForCausalLMWithValueHead is vhead.AutoModelForCausalLMWithValueHead
    assert PreTrainedModelWrapper is vhead.PreTrainedModelWrapper
    assert PPOTrainer.__module__.startswith("trl.")
    import trl.experimental.utils as utils
    assert utils.create_reference_model is vhead.create_reference_model
    print(list(DataLoader(Modules(), num_workers=1, multiprocessing_context="spawn", batch_size=2)))
"""


@pytest.mark.skipif(not HAS_EXPERIMENTAL_PPO, reason="no trl with `trl.experimental.ppo` is installed")
def test_the_installed_trl_and_a_data_loader_s_worker(python: Python, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(REAL)
    done = python(*RUNNER, "program.py", PYTHONPATH="", TRL_EXPERIMENTAL_SILENCE="1")
    assert outcome(done)[:2] == (0, "[['vhead.modeling.wrapper', 'vhead.modeling.wrapper']]\n"), done.stderr


def test_installing_imports_neither_trl_nor_torch(python: Python) -> None:
    code = (
        "import sys; from vhead.compat.trl import install, status; install(); str(status()); "
        "print({'trl', 'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert python("-c", code).stdout == "set()\n"


LAUNCHED = """\
import os, sys
import trl.models.modeling_value_head as found
sys.stdout.write(f"worker {sys.argv[1:]} {found.__file__.endswith('stand_in.py')}\\n")
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


@pytest.mark.parametrize(
    ("words", "workers"),
    [((*RUNNER, *TORCHRUN, "program.py"), 2), ((*ACCELERATE, *RUNNER, "program.py"), 1)],
    ids=["runner-torchrun", "accelerate-runner"],
)
def test_launched_processes_have_the_names(
    python: Python, tmp_path: Path, words: tuple[str, ...], workers: int
) -> None:
    (tmp_path / "program.py").write_text(LAUNCHED)
    done = python(*words, "--lr")
    assert done.stdout == "worker ['--lr'] True\n" * workers, done.stderr
