"""Files of heads, mutated: looking for a head ends in a head, in none, or in an error of vhead's."""

import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

import vhead.checkpoints.tensor_files
from tests.attack.mutations import mutate_file
from tests.attack.scale import scaled
from vhead.errors import VheadError
from vhead.formats import detect, find_head, load

GOLDEN = Path(__file__).parent.parent / "formats" / "golden"
FOLDERS = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
SHARE = scaled(short=12, long=-(-60_000 // len(FOLDERS)))


def attack(golden, folder, count):
    """What mutations of a golden folder end in that is neither a head nor an error of vhead's, and how many heads."""
    random_ = random.Random(golden.name)
    offences, found = [], 0
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(golden, folder)
        file = random_.choice(sorted(folder.iterdir()))
        mutate_file(file, random_)
        alone = file if file.suffix in {".nemo", ".pt", ".bin", ".safetensors"} and random_.random() < 0.5 else folder
        try:
            found += random_.choice((find_head, load, detect))(alone) is not None
        except VheadError:
            pass
        except Exception as error:
            offences.append(error)
    return offences, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("golden", FOLDERS, ids=lambda path: path.name)
def test_mutated_heads_end_in_errors_of_vhead_s_only(golden, tmp_path):
    offences, _ = attack(golden, tmp_path / "x", SHARE)
    assert offences == []


@pytest.mark.filterwarnings("ignore")
def test_some_mutations_leave_a_head(tmp_path):
    assert attack(GOLDEN / "plain", tmp_path / "x", 20)[1] == 0
    assert attack(GOLDEN / "trl_single", tmp_path / "x", 60)[1] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["trl_single", "trl_adapter", "nemo_archive"])
def test_the_attack_finds_an_error_of_another_package(name, tmp_path, monkeypatch):
    """The control: without the gate around the readers of files, other packages' errors come through."""
    monkeypatch.setattr(vhead.checkpoints.tensor_files, "_naming", lambda *_: nullcontext())
    offences, _ = attack(GOLDEN / name, tmp_path / "x", 60)
    assert any(type(error).__module__ != "vhead.errors" for error in offences)
