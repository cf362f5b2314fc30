import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from tests.typer_runner import RUNNER
from vhead import cli, upstream
from vhead.cli.app import app
from vhead.packing.tree_packing import TreePacking


def run(*arguments):
    return RUNNER.invoke(app, arguments, env={"COLUMNS": "120"})


def test_version():
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"vhead {version('vhead')}\n")


def test_help_names_the_commands():
    done = run("--help")
    assert done.exit_code == 0
    for name in ("score", "demo", "env"):
        assert f" {name} " in done.stdout


def test_help_of_score_has_examples_and_every_option():
    done = run("score", "--help")
    assert "vhead score rollouts.jsonl --model ./critic --output scores.jsonl" in done.stdout
    names = "returns temperature dtype device token-budget num-threads allow-random-head truncate max-length limit"
    for name in (*names.split(), "on-error", "resume", "quiet"):
        assert f"--{name}" in done.stdout


@pytest.mark.parametrize("command", [[], ["score"], ["compare"], ["convert"], ["bench"], ["demo"], ["env"]])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_cut_nowhere(command, columns):
    done = RUNNER.invoke(app, [*command, "--help"], env={"COLUMNS": str(columns)})
    assert "…" not in done.stdout
    assert not re.search(r"fl *│?\n.*oat16|comple *│?\n.*tion", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= columns


def test_help_says_what_an_option_is_by_default():
    text = " ".join(re.sub(r"[│ ]+", " ", run("score", "--help").stdout).split())
    assert "Tokens of a batch. Default: the fastest on this machine." in text
    assert "Default: values, logprobs and reward, without logprobs if the checkpoint has no" in text


@pytest.mark.parametrize(("words", "expected"), [("vhead sc", "score"), ("vhead score --batch-i", "--batch-invariant")])
def test_the_shell_completes_commands_and_options(vhead, words, expected):
    environment = {**os.environ, "_VHEAD_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(words.count(" "))
    program = "import sys; sys.argv = ['vhead']; from vhead.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == [expected]


@pytest.mark.parametrize("arguments", ["['--help']", "['score', '--help']", "['--version']"])
def test_help_is_fast_because_it_imports_no_torch(fresh_python, arguments):
    code = (
        "import sys\nfrom vhead.cli import main\n"
        f"sys.argv = ['vhead', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "print('imported:', sorted(heavy))"
    )
    assert fresh_python(code).endswith("imported: []")


def test_unknown_command():
    done = run("score-all")
    assert done.exit_code == 2
    assert "No such command 'score-all'" in done.stderr


def test_env(monkeypatch):
    monkeypatch.setenv("VHEAD_PLAIN_TORCH", "1")
    done = run("env")
    assert done.exit_code == 0
    facts = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["vhead"] == version("vhead")
    assert facts["torch"] == version("torch")
    assert facts["VHEAD_PLAIN_TORCH"] == "1"
    assert facts["torch threads"] == str(torch.get_num_threads())
    assert any(name.startswith("backend") for name in facts)
    assert facts["upstream names missing"] == "none"
    assert facts["scorer strategy"].startswith("tree packing")


def broken(*_args):
    raise AttributeError("'Model' object has no attribute 'moved'")


def test_env_says_what_a_release_of_another_package_cost(monkeypatch):
    monkeypatch.setattr(upstream, "NAMES", (*upstream.NAMES, upstream.Name("torch.gone", "a test")))
    if not upstream.available("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this release never packed by segments")
    monkeypatch.setattr(TreePacking, "batches", broken)
    facts = dict(re.split("  +", line, maxsplit=1) for line in run("env").stdout.splitlines())
    assert facts["upstream names missing"] == "torch.gone"
    assert facts["scorer not tree packing"] == "AttributeError: 'Model' object has no attribute 'moved'"


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "vhead.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("vhead.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == "vhead: typer is not installed; the command line needs: pip install 'vhead[cli]'"


def test_a_defect_is_not_dressed_up_as_a_missing_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "vhead.cli.app")
    monkeypatch.setitem(sys.modules, "vhead.cli.score", None)
    with pytest.raises(ModuleNotFoundError, match=r"vhead\.cli\.score"):
        cli.main()
