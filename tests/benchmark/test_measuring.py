"""What is measured and how it is written down; how long anything takes is nobody's business here."""

import importlib.metadata
import json

import pytest
import torch

from vhead.benchmark import cases, machine, trl_head
from vhead.benchmark.document import Document
from vhead.benchmark.peers import Weights, saved_bytes, trl_path, vhead_module, vhead_op
from vhead.benchmark.run import Request, check_compiler, make_peers, run
from vhead.benchmark.timing import interleaved, quantiles, turns
from vhead.errors import BenchmarkError, FileFormatError

LABEL = ["mode", "shape", "dtype", "implementation"]
FIGURES = ["p20_us", "p50_us", "p80_us", "rounds", "bytes", "gb_per_s", "load_before", "load_after"]


@pytest.fixture(scope="module")
def document() -> Document:
    """A run on a tiny input."""
    return run(Request.usual("cpu", shapes=((16, 24),), dtypes=(torch.bfloat16,), rounds=2, quick=True))


def test_a_run_has_every_mode_and_implementation(document):
    assert document.passed
    modes = {"inference": {"copy"}, "dropout": set(), "backward": set(), "training": set()}
    for mode, others in modes.items():
        medians = document.medians(mode, (16, 24), "bfloat16")
        assert set(medians) == {"vhead", "vhead.ops", "trl path"} | others
        assert all(median > 0 for median in medians.values())
    for row in document.times:
        assert list(row) == LABEL + FIGURES
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert {row["implementation"] for row in document.saved} == {"vhead", "vhead.ops", "trl path"}


def test_bytes_are_those_that_must_move(document):
    moved = {(row["mode"], row["implementation"]): row["bytes"] for row in document.times}
    once = 16 * 24 * 2
    assert moved["inference", "vhead"] == moved["dropout", "vhead"] == once
    assert moved["inference", "copy"] == moved["backward", "vhead"] == 2 * once
    assert moved["training", "vhead"] == 3 * once
    for row in document.times:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3)


def test_the_run_says_where_it_was(document):
    source = document.provenance
    assert source["device"] == "cpu"
    assert source["backend"]["kernel"] == "native"
    assert source["torch"] == importlib.metadata.version("torch")
    assert source["torch_threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "load_before", "load_after", "environment", "vhead", "trl", "rounds", "date"} <= set(source)


def test_files_keep_everything(document, tmp_path):
    path = tmp_path / "bench.json"
    document.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    assert Document.load(path) == document
    assert set(json.loads(path.read_text())) == {"provenance", "times", "saved", "comparisons", "checks"}


@pytest.mark.parametrize("text", ["{", "[]", '{"times": []}', '{"provenance": {}, "colour": []}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=r"other\.json: expected the figures that vhead bench writes"):
        Document.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_peers_compute_the_same(dtype):
    weights = Weights.draw(96)
    hidden = torch.randn(20, 96).to(dtype)
    exact = hidden.double() @ weights.weight.double().flatten() + weights.bias.double()
    for make in (vhead_module, vhead_op, trl_path):
        peer = make(weights)
        torch.testing.assert_close(peer.at(0.0)(hidden).flatten().double(), exact, rtol=1e-4, atol=1e-4)
        dropped = peer.at(0.1)(hidden).flatten().double()
        assert not torch.allclose(dropped, exact, rtol=1e-2, atol=1e-2)
        assert torch.equal(peer.at(0.0)(hidden), peer.at(0.0)(hidden)), "back to inference"


def test_trl_s_path_keeps_what_ours_does_not():
    weights, hidden = Weights.draw(96), torch.randn(20, 96).bfloat16()
    assert saved_bytes(vhead_op(weights), hidden, 0.1) <= 8
    assert saved_bytes(trl_path(weights), hidden, 0.1) > hidden.nbytes


def test_turns_are_taken_by_all():
    calls = {"a": 0, "b": 0}

    def work(name):
        calls[name] += 1

    def timer(work, count):
        for _ in range(count):
            work()
        return 1.0

    times = interleaved({name: lambda name=name: work(name) for name in calls}, rounds=5, timer=timer)
    assert times == {"a": [1.0] * 5, "b": [1.0] * 5}
    assert calls == {"a": 12, "b": 12}, "two to begin with, then two a round"
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0])["p50_us"] == 3e6


def test_a_round_has_each_once_in_an_order_of_its_own():
    taken = list(turns("abcdefgh", 3))
    rounds = [[name for number, name in taken if number == at] for at in range(3)]
    assert [sorted(names) for names in rounds] == [list("abcdefgh")] * 3
    assert len({tuple(names) for names in [list("abcdefgh"), *rounds]}) == 4
    assert taken == list(turns("abcdefgh", 3)), "the same in every run"


def trl_version(monkeypatch, version):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(machine.importlib.metadata, "version", found)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "trl is not installed"),
        ("1.13.0", "trl 1.13.0 has no value head"),
        ("1.16.0", "trl 1.16.0 has no value head"),
        ("2.0.0rc1", "trl 2.0.0rc1 has no value head"),
    ],
)
def test_trl_is_not_imported_where_it_has_no_head(monkeypatch, version, reason):
    trl_version(monkeypatch, version)
    monkeypatch.setattr(trl_head, "_trl_module", lambda: pytest.fail("imported"))
    assert trl_head.trl_absence() == reason
    request = Request.usual("cpu")
    assert "trl" not in {peer.name for peer in make_peers(request)(Weights.draw(4))}


def test_a_trl_that_does_not_work_here_is_named(monkeypatch):
    def broken():
        raise ImportError("cannot import name 'ReferenceModel'\nand so on")

    trl_version(monkeypatch, "0.7.1")
    monkeypatch.setattr(trl_head, "_trl_module", broken)
    assert trl_head.trl_absence() == "trl 0.7.1 cannot be imported: cannot import name 'ReferenceModel'"


def test_trl_s_own_head_is_measured_where_it_is():
    if reason := trl_head.trl_absence():
        pytest.skip(reason)
    weights, hidden = Weights.draw(96), torch.randn(20, 96).bfloat16()
    (peer,) = (peer for peer in make_peers(Request.usual("cpu"))(weights) if peer.name == "trl")
    path = trl_path(weights)
    assert torch.equal(peer.at(0.0)(hidden), path.at(0.0)(hidden))
    values = []
    for each in (peer, path):
        torch.manual_seed(3)
        values.append(each.at(0.1)(hidden))
    assert torch.equal(*values), "the path in plain torch is TRL's"


def test_what_fits_the_device_is_chosen():
    assert Request.usual("cpu").shapes[0] == (8192, 2048)
    quick = Request.usual("cpu", quick=True)
    assert (len(quick.shapes), quick.dtypes, quick.rounds) == (1, (torch.bfloat16, torch.float32), 7)
    asked = Request.usual("cpu", shapes=((3, 4),), dtypes=(torch.float16,), rounds=2)
    assert (asked.shapes, asked.dtypes, asked.rounds) == (((3, 4),), (torch.float16,), 2)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps", ""])
def test_other_devices_are_refused(name):
    with pytest.raises(BenchmarkError, match=f"device: expected cpu, cuda or cuda:N, got '{name}'"):
        machine.find_device(name)


def test_cuda_that_is_not_there_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BenchmarkError, match=r"CUDA was asked for, and torch .* is built without it"):
        machine.find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    with pytest.raises(BenchmarkError, match=r"torch finds no device: Found no NVIDIA driver on your system\.$"):
        machine.find_device("cuda")
    assert machine.find_device(None) == torch.device("cpu")


def test_a_number_that_no_device_has_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert machine.find_device("cuda:1") == torch.device("cuda", 1)
    assert machine.find_device(None) == machine.find_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(BenchmarkError, match="device: expected cuda:0 to cuda:1, got 'cuda:2'"):
        machine.find_device("cuda:2")


def test_memory_that_runs_out_names_the_shape(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cases.Case, "draw", full)
    with pytest.raises(BenchmarkError, match=r"shape: .* the memory of cpu .* got \[16, 24\] torch\.bfloat16"):
        run(Request.usual("cpu", shapes=((16, 24),), dtypes=(torch.bfloat16,), rounds=2, quick=True))


def test_a_compiler_that_does_not_work_is_named(monkeypatch):
    def no_compiler(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(BenchmarkError, match=r"compile: .* InvalidCxxCompiler: No working C\+\+ compiler found$"):
        check_compiler(torch.device("cpu"))


def test_the_compiled_path_is_a_contestant(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    request = Request.usual("cpu", compiles=True, quick=True)
    names = [peer.name for peer in make_peers(request)(Weights.draw(4))]
    assert names == ["vhead", "vhead.ops", "trl path", "trl path, compiled"]
    case = cases.Case.draw((4, 8), torch.float32, make_peers(request), 2)
    assert [peer.name for peer in case.without("compiled").peers] == names[:-1]
