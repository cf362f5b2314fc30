"""The gate around other packages: what they raise names the file, what is our own mistake stays to be seen."""

import errno
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import vhead
from vhead.checkpoints.replacing import replacing_file, replacing_folder
from vhead.errors import HeadFileError, LoadError, VheadError, loading, naming


class PanicException(BaseException):
    """What an extension in Rust raises when it fails inside."""


@pytest.mark.parametrize("error", [TypeError, KeyError, ZeroDivisionError, MemoryError, RecursionError, PanicException])
def test_what_another_package_raises_is_one_line_that_names_the_folder(error):
    def of_another_package():
        raise error("first line\nsecond\tline")

    with pytest.raises(LoadError) as caught, loading("a/folder"):
        of_another_package()
    assert str(caught.value).startswith(f"a/folder: cannot be loaded: {error.__name__}: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, error)


def test_a_message_of_megabytes_is_cut():
    with pytest.raises(LoadError) as caught, loading("a/folder"):
        raise ValueError("x" * 10_000_000)
    assert len(str(caught.value)) < 1000


def test_callers_of_transformers_catch_it_as_before():
    assert issubclass(LoadError, VheadError)
    assert issubclass(LoadError, OSError)
    assert issubclass(LoadError, ValueError)
    assert str(pickle.loads(pickle.dumps(LoadError("a: b")))) == "a: b"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, HeadFileError("a file")])
def test_an_interrupt_and_our_own_errors_pass(error):
    with pytest.raises(error if isinstance(error, type) else type(error)), loading("a/folder"):
        raise error


def in_a_module_of_vhead(source, **names):
    """Runs a source as if it stood in a module of the package."""
    exec(compile(source, str(Path(vhead.__file__).parent / "invented.py"), "exec"), names)


def test_a_mistake_of_our_own_stays_visible():
    with pytest.raises(AttributeError, match="no attribute 'missing'"), loading("a/folder"):
        in_a_module_of_vhead("object().missing")


@pytest.mark.parametrize("source", ["json.loads('[')", "torch.nn.Linear(-1, 1)", "open('/nowhere/to/be/found')"])
def test_what_our_code_calls_is_another_package_s(source):
    with pytest.raises(LoadError), loading("a/folder"):
        in_a_module_of_vhead(source, json=json, torch=torch)


def test_an_error_of_the_system_without_a_name_gets_the_file_s():
    with (
        pytest.raises(OSError, match=re.escape("[Errno 28] No space left on device: 'scores.jsonl'")),
        naming("scores.jsonl"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_name_that_the_system_gave_is_kept():
    with pytest.raises(FileNotFoundError, match=re.escape("'missing'")), naming("scores.jsonl"):
        Path("missing").read_bytes()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_told_of_with_the_output_s_name(tmp_path, kind):
    path = tmp_path / "critic"
    replacing = replacing_file(path) if kind == "file" else replacing_folder(path, overwrite=False)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")), replacing:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
