"""`vhead sync`."""

import torch

from tests.typer_runner import RUNNER
from vhead.cli.app import app
from vhead.sync import Publisher


def run(*arguments):
    return RUNNER.invoke(app, ["sync", *map(str, arguments)])


def test_show_verify_and_gc(tmp_path):
    publisher = Publisher(tmp_path, delta=True, full_every=2)
    for step in range(1, 5):
        weight = torch.arange(100.0)
        weight[0] = 1000 + step
        publisher.publish({"weight": weight}, step=step, metadata={"n": step})
    shown = run("show", tmp_path)
    assert "step 3: full, model" in shown.stdout
    assert "step 4 (latest): changes to step 3" in shown.stdout
    assert run("verify", tmp_path).stdout == "step 4: whole\n"
    assert run("gc", tmp_path, "--keep", "1").stdout == "removed step 1\nremoved step 2\n"
    file = tmp_path / "step-00000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    failed = run("verify", tmp_path)
    assert failed.exit_code == 1
    assert "nothing of it was installed" in failed.stderr


def test_verify_finds_damage_that_a_later_delta_would_write_over(tmp_path):
    publisher = Publisher(tmp_path, delta=True)
    for step in (1, 2):
        publisher.publish({"weight": torch.randn(100)}, step=step)
    assert run("verify", tmp_path).stdout == "step 2: whole\n"
    file = tmp_path / "step-00000001" / "model.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-50] ^= 1
    file.write_bytes(broken)
    failed = run("verify", tmp_path)
    assert failed.exit_code == 1
    assert "step-00000001" in failed.stderr
