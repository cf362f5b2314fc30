"""Code that a checkpoint brings along runs if the caller says so, and nobody is ever asked on standard input."""

import json
import sys

import pytest
from transformers import ByT5Tokenizer, dynamic_module_utils

from tests.modeling.tiny_models import build
from tests.typer_runner import RUNNER
from vhead import AutoModelForCausalLMWithValueHead, Scorer
from vhead.cli.app import app
from vhead.errors import LoadError

CODE = """
import os
open(os.environ["VHEAD_TEST_TRAP"], "w").close()
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MyConfig
class MyTokenizer(ByT5Tokenizer):
    pass
"""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.setenv("VHEAD_TEST_TRAP", str(tmp_path / "code ran"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "code ran"


@pytest.fixture
def folder(tmp_path):
    AutoModelForCausalLMWithValueHead(build("llama")).save_pretrained(tmp_path / "critic")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "critic")
    return tmp_path / "critic"


def with_code(folder, part):
    """The folder with Python for its configuration, its model or its tokenizer."""
    (folder / "mine.py").write_text(CODE)
    name = "tokenizer_config.json" if part == "tokenizer" else "config.json"
    settings = json.loads((folder / name).read_text())
    if part == "configuration":
        settings |= {"model_type": "mine", "architectures": ["Mine"]}
        settings["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"}
    elif part == "model":
        settings["auto_map"] = {"AutoModelForCausalLM": "mine.Mine"}
    else:
        settings |= {"auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}, "tokenizer_class": "MyTokenizer"}
    (folder / name).write_text(json.dumps(settings))
    return folder


class Yes:
    """A standard input that says yes to everything, and knows that it was asked."""

    def __init__(self):
        self.asked = 0

    def readline(self, *_arguments):
        self.asked += 1
        return "y\n"

    read = readline

    def fileno(self):
        raise OSError

    def isatty(self):
        return False


@pytest.fixture
def yes(monkeypatch):
    yes = Yes()
    monkeypatch.setattr(sys, "stdin", yes)
    return yes


@pytest.mark.parametrize("part", ["configuration", "model", "tokenizer"])
@pytest.mark.parametrize("load", [AutoModelForCausalLMWithValueHead.from_pretrained, Scorer.from_pretrained])
def test_code_of_a_folder_does_not_run_whatever_standard_input_says(folder, trap, yes, part, load):
    try:
        load(with_code(folder, part))
    except LoadError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017, some parts have a class of transformers' own beside
    assert yes.asked == 0
    assert not trap.exists()


def test_the_folder_would_have_run_it(folder, trap, yes):
    """The control: transformers asks, and is told yes."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(with_code(folder, "configuration"))
    assert yes.asked == 1
    assert trap.exists()


@pytest.mark.parametrize("part", ["configuration", "tokenizer"])
@pytest.mark.parametrize("load", [AutoModelForCausalLMWithValueHead.from_pretrained, Scorer.from_pretrained])
def test_code_of_a_folder_runs_if_the_caller_says_so(folder, trap, yes, part, load):
    loaded = load(with_code(folder, part), trust_remote_code=True)
    reads_tokenizer = isinstance(loaded, Scorer)
    assert yes.asked == 0
    assert trap.exists() == (part == "configuration" or reads_tokenizer)


@pytest.mark.parametrize("options", [[], ["--trust-remote-code"]])
def test_the_command_line_asks_nothing_and_has_an_option(folder, trap, tmp_path, options):
    """Its standard input holds rollouts; the first line of them says yes to whoever asks."""
    arguments = ["score", "-", "--model", with_code(folder, "configuration"), "--output", tmp_path / "out.jsonl"]
    rollout = '{"prompt_ids": [1], "completion_ids": [2]}\n'
    done = RUNNER.invoke(app, [*map(str, arguments), *options], input=rollout if options else f"y\n{rollout}")
    assert done.exit_code == (0 if options else 1), done.stderr
    assert trap.exists() == bool(options)


def test_an_attention_kernel_from_the_hub_is_code(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attn_implementation": "somebody/kernel"}))
    with pytest.raises(LoadError, match=r"config\.json: attn_implementation: 'somebody/kernel' is code from the hub"):
        AutoModelForCausalLMWithValueHead.from_pretrained(folder)
