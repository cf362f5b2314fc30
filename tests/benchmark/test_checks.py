"""The other checks: they hold on the CPU, and what they are to find is found."""

from functools import partial

import pytest
import torch

from vhead.benchmark import checks, machine
from vhead.ops import value_head, value_head_plain

CPU = torch.device("cpu")


def test_all_checks_hold_on_the_cpu():
    rows = list(checks.run_checks(CPU))
    assert [row["check"] for row in rows if not row["passed"]] == []
    assert len(rows) == len(checks.CHECKS) >= 4


def test_checks_of_streams_and_graphs_are_for_cuda_alone():
    assert set(checks.CUDA_CHECKS).isdisjoint(checks.CHECKS)
    assert len(checks.CUDA_CHECKS) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_check_that_fails_with_an_error_leaves_the_others_running(monkeypatch):
    def failing(device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(checks, "CHECKS", {"first": failing, **checks.CHECKS})
    first, *others = checks.run_checks(CPU)
    assert first == {"check": "first", "passed": False, "detail": "RuntimeError: no kernel image is available"}
    assert all(row["passed"] for row in others)


def test_plain_torch_in_place_of_the_kernels_is_found(monkeypatch):
    assert checks.kernels_run(CPU) is None
    table = {"cpu": {"kernel": "plain torch", "reason": "no CUDA driver"}, "other devices": {"kernel": "plain torch"}}
    monkeypatch.setattr(machine, "backends", lambda: table)
    assert checks.kernels_run(CPU) == "plain torch runs there: no CUDA driver"
    assert checks.kernels_run(torch.device("mps")).endswith("there are no kernels for this device")


def test_seeds_that_do_not_follow_torch_are_found(monkeypatch):
    monkeypatch.setattr(checks, "value_head", partial(value_head, seed=3))
    assert checks.seeds_are_torch_s(CPU) == "two calls drew the same mask"
    counter = iter(range(100))
    monkeypatch.setattr(checks, "value_head", lambda *x, **p: value_head(*x, **p, seed=next(counter)))
    assert checks.seeds_are_torch_s(CPU) == "the same seed gave another mask"


def test_initial_weights_that_differ_are_found(monkeypatch):
    def fill(weight, bias):
        torch.nn.init.normal_(weight)
        torch.nn.init.zeros_(bias)
        weight[0, 0] += next(off)

    off = iter([0.0, 1e-3])
    monkeypatch.setattr(checks, "init_linear_", fill)
    assert checks.same_initial_weights(CPU) == "linear: 1 numbers differ from the CPU's"


def test_inexact_statistics_are_found(monkeypatch):
    original = checks.token_statistics

    def rounded(*inputs, **asked):
        statistics = original(*inputs, **asked)
        return statistics._replace(**{field: getattr(statistics, field).bfloat16().float()})

    monkeypatch.setattr(checks, "token_statistics", rounded)
    for field in ("entropy", "candidate_logprobs", "top_logprobs"):
        assert checks.statistics_are_close(CPU).startswith(f"{field} in torch.float32: off by")


def computed(seed, head=value_head, drawn=None):
    """What a replay would give that drew this seed."""
    inputs = checks.Inputs.draw(checks._PLAN, torch.bfloat16, 1024, special=False)
    rows = inputs.flat[: 300 * 1024].view(300, 1024)
    found = {"values": head(rows, inputs.weight[:1], inputs.bias[:1], dropout_p=0.5, seed=seed)}
    inside = value_head(rows, inputs.weight[:1], dropout_p=0.5, seed=seed if drawn is None else drawn)
    return found | {"drawn inside": inside}


def expected(seed):
    return {"values": computed(seed)["values"]}


def test_replays_that_draw_new_masks_are_right():
    assert checks.judge_replays([(seed, computed(seed)) for seed in (5, -6, 7)], expected) is None


def test_frozen_seeds_and_masks_are_found():
    assert "same seed" in checks.judge_replays([(5, computed(5)), (5, computed(5))], expected)
    frozen = [(5, computed(5, drawn=1)), (6, computed(6, drawn=1))]
    assert "used the same mask" in checks.judge_replays(frozen, expected)


def test_replays_that_do_not_use_their_seed_are_found():
    stale = [(5, computed(5)), (6, {**computed(6), "values": computed(5)["values"]})]
    assert checks.judge_replays(stale, expected) == "values: 300 elements differ from the CPU's"
    plain = [(seed, computed(seed, head=value_head_plain)) for seed in (5, 6)]
    assert checks.judge_replays(plain, expected).startswith("values: ")


def test_what_a_graph_computes_is_what_the_cpu_is_asked_for():
    inputs = checks.Inputs.draw(checks._PLAN, torch.bfloat16, 1024, special=False)
    given = checks._found(inputs, torch.tensor(5))
    assert set(given) == {"values", "grad_hidden", "grad_weight", "grad_bias", "grad_weight, frozen trunk", "mask"}
    assert checks.difference(checks._found(inputs, 5), given) is None
    assert checks.difference(checks._found(inputs, 6), given).startswith("values: 300 elements differ")
