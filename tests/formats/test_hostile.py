"""What every format does with a head that is broken: the right error, never another head than the one in the file."""

import io
import json
import os
import shutil
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import vhead.checkpoints.tensor_files
from tests.formats.golden import EXPECTED, GOLDEN, layers, location
from tests.formats.test_find_head import Bomb, header
from vhead.checkpoints.checkpoint import regular_file
from vhead.errors import EnvironmentVariableError, HeadError, HeadFileError, HeadMismatchError
from vhead.formats import BIAS_KEY, FORMATS, WEIGHT_KEY, detect, find_head, load

# Archives have their own tests; the shards' tensors are those of `trl_single`.
NAMES = [name for name in EXPECTED if name not in ("nemo_archive", "trl_sharded")]
# What is wrong with an output layer, or lies beside it, is the language model's.
OUTSIDE_THE_OUTPUT_LAYER = [name for name in NAMES if name != "verl_megatron"]
WITH_BIAS = [name for name in NAMES if EXPECTED[name]["layers"][-1]["bias"] is not None]
BY_NAME = {head_format.name: head_format for head_format in FORMATS}


def head_file(name):
    """The golden file that holds the head."""
    folder = GOLDEN / name
    alone = [path for path in folder.iterdir() if path.name.startswith("value_head")]
    return (alone or [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")])[0]


def changed(name, folder, change):
    """A copy of a golden checkpoint with another state dict in the file of its head."""
    shutil.copytree(GOLDEN / name, folder / name)
    file = folder / name / head_file(name).name
    if file.suffix == ".safetensors":
        state = load_file(file)
        change(state)
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    else:
        state = whole = torch.load(file, weights_only=True)
        if "model" in whole:
            state = whole["model"]
        change(state)
        torch.save(whole, file)
    return folder / name / EXPECTED[name].get("file", "")


def tensors(name):
    """The names of the head's tensors, weights before biases, the last projection's first."""
    return sorted(detect(location(name)).tensors, key=lambda key: (key.endswith("bias"), -int("2" in key)))


def weight_of(name):
    return tensors(name)[0]


def bias_of(name):
    return next(key for key in tensors(name) if key.endswith("bias"))


def replace(key, change):
    def apply(state):
        state[key] = change(state[key])

    return apply


def outcome(path):
    """What looking for a head ends in; all ways to look must agree."""
    results = []
    for look in (find_head, load, detect):
        try:
            look(path)
            results.append(None)
        except HeadError as error:
            results.append(error)
    assert len({type(result) for result in results}) == 1, results
    return results[0]


@pytest.mark.parametrize("name", OUTSIDE_THE_OUTPUT_LAYER)
@pytest.mark.parametrize(
    "change",
    [lambda w: w.flatten(), lambda w: w[None], lambda w: w[:0], lambda w: w[:, :0], lambda w: torch.tensor(1.0)],
    ids=["flat", "three dimensions", "no rows", "no columns", "a number"],
)
def test_a_weight_of_another_shape(tmp_path, name, change):
    path = changed(name, tmp_path, replace(weight_of(name), change))
    if "output_layer" in weight_of(name) and change(torch.ones(1, 8)).shape[:1] != (1,):
        assert find_head(path) is None
    else:
        error = outcome(path)
        assert type(error) is HeadMismatchError
        assert weight_of(name) in str(error)
        assert "expected" in str(error)


@pytest.mark.parametrize("name", WITH_BIAS)
@pytest.mark.parametrize(
    "change",
    [lambda b: b[None], lambda b: b[:0], lambda b: b.repeat(2), lambda b: b[0]],
    ids=["row", "none", "two", "0-d"],
)
def test_a_bias_of_another_shape(tmp_path, name, change):
    error = outcome(changed(name, tmp_path, replace(bias_of(name), change)))
    assert type(error) is HeadMismatchError
    assert bias_of(name) in str(error)


@pytest.mark.parametrize("name", WITH_BIAS)
def test_a_missing_bias(tmp_path, name):
    path = changed(name, tmp_path, lambda state: state.pop(bias_of(name)))
    if BY_NAME[EXPECTED[name]["format"]].layouts[0][0].bias_optional:
        assert load(path).layers[0].bias is None
        assert torch.equal(load(path).weight, load(location(name)).weight)
    else:
        error = outcome(path)
        assert type(error) is HeadMismatchError
        assert bias_of(name) in str(error)


@pytest.mark.parametrize("name", [name for name in NAMES if len(tensors(name)) > 1])
def test_a_missing_weight(tmp_path, name):
    path = changed(name, tmp_path, lambda state: state.pop(weight_of(name)))
    if "output_layer" in weight_of(name):
        assert find_head(path) is None
    else:
        error = outcome(path)
        assert type(error) is HeadMismatchError
        assert weight_of(name) in str(error)


@pytest.mark.parametrize("name", OUTSIDE_THE_OUTPUT_LAYER)
def test_one_tensor_too_many(tmp_path, name):
    extra = weight_of(name).removesuffix("weight") + "scale"
    path = changed(name, tmp_path, lambda state: state.update({extra: torch.ones(3)}))
    error = outcome(path)
    assert type(error) is HeadMismatchError
    assert f"{extra} [3]" in str(error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_become_float32(tmp_path, name, dtype):
    def cast(state):
        for key in tensors(name):
            state[key] = state[key].to(dtype)

    head = load(changed(name, tmp_path, cast))
    for layer, (weight, bias) in zip(head.layers, layers(name), strict=True):
        assert torch.equal(layer.weight, weight.to(dtype).float())
        assert layer.bias is None or torch.equal(layer.bias, bias.to(dtype).float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_no_head(tmp_path, name, dtype):
    error = outcome(changed(name, tmp_path, replace(weight_of(name), lambda w: w.to(dtype))))
    assert type(error) is HeadMismatchError
    assert str(dtype) in str(error)
    assert weight_of(name) in str(error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, name, number):
    key = tensors(name)[-1]
    path = changed(name, tmp_path, replace(key, lambda w: w.clone().index_fill_(-1, torch.tensor([0]), number)))
    for look in (find_head, load):
        with pytest.raises(HeadFileError, match="finite") as error:
            look(path)
        assert key in str(error.value)


@pytest.mark.parametrize("name", [*NAMES, "trl_sharded"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_file(tmp_path, name, part):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    for file in (tmp_path / name).iterdir():
        if file.suffix != ".json":
            file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert type(outcome(tmp_path / name / EXPECTED[name].get("file", ""))) is HeadFileError


CONTENT = {
    "header of an exabyte": header((1 << 63) - 1, b"{}"),
    "deep JSON": header(40_000, b"[" * 40_000),
    "overlapping tensors": None,
    "pickle": b"\x80\x04]\x94.",
}


@pytest.mark.parametrize("name", ["value_head.safetensors", "model.safetensors", "value_head.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("content", CONTENT)
def test_bombs(tmp_path, name, content):
    entry = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    text = json.dumps({WEIGHT_KEY: entry, BIAS_KEY: {**entry, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / name).write_bytes(CONTENT[content] or header(len(text), text) + bytes(36))
    assert type(outcome(tmp_path)) is HeadFileError


def test_two_different_heads_are_ambiguous_and_equal_ones_are_one(tmp_path):
    shutil.copytree(GOLDEN / "trl_single", tmp_path / "model")
    head = {key: value for key, value in load_file(tmp_path / "model" / "model.safetensors").items() if "v_head" in key}
    save_file(head, tmp_path / "model" / "value_head.safetensors")
    assert load(tmp_path / "model").format == "trl"
    assert load(tmp_path / "model", format="llama-factory").format == "llama-factory"
    save_file({key: value + 1 for key, value in head.items()}, tmp_path / "model" / "value_head.safetensors")
    error = outcome(tmp_path / "model")
    assert type(error) is HeadMismatchError
    assert "found 2: v_head (trl: " in str(error)
    assert "value_head.safetensors (llama-factory: " in str(error)
    assert torch.equal(load(tmp_path / "model", format="llama-factory").bias, head[BIAS_KEY] + 1)


@pytest.mark.parametrize("name", ["value_head.pt", "value_head.bin", "pytorch_model.bin"])
def test_code_in_a_pickle_never_runs(tmp_path, name):
    torch.save({WEIGHT_KEY: torch.ones(1, 8), "bomb": Bomb(tmp_path / "trap")}, tmp_path / name)
    error = outcome(tmp_path)
    assert type(error) is HeadFileError
    assert "weights_only" not in str(error), "nobody is sent to the switch that runs it"
    assert not (tmp_path / "trap").exists()


def archive(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def pickled(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_are_read_without_unpacking(tmp_path, mode):
    with tarfile.open(location("nemo_archive")) as golden:
        content = golden.extractfile("./model_weights.ckpt").read()
    path = archive(tmp_path / "x.nemo", [("../../model_weights.ckpt", content), ("/etc/evil", b"x")], mode)
    assert torch.equal(load(path).weight, load(location("nemo_archive")).weight)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("model_config.yaml", b"{}")],
        [("model_weights/metadata.json", b"{}"), ("model_weights/__0_0.distcp", b"x")],
        [(f"mp_rank_0{rank}/model_weights.ckpt", pickled({})) for rank in (0, 1)],
    ],
    ids=["empty", "no weights", "distributed", "two ranks"],
)
def test_archives_of_several_devices_are_refused(tmp_path, members):
    error = outcome(archive(tmp_path / "x.nemo", members))
    assert type(error) is HeadFileError
    assert "model_weights.ckpt" in str(error)


@pytest.mark.parametrize("length", [0, 100, 600, 1500, 2000])
def test_a_truncated_archive(tmp_path, length):
    (tmp_path / "x.nemo").write_bytes(location("nemo_archive").read_bytes()[:length])
    assert type(outcome(tmp_path / "x.nemo")) is HeadFileError


def test_hostile_archives(tmp_path):
    assert type(outcome(archive(tmp_path / "a.nemo", [("model_weights.ckpt", b"no pickle")]))) is HeadFileError
    bomb = pickled({"model.rm_head.weight": torch.ones(1, 8), "bomb": Bomb(tmp_path / "trap")})
    assert type(outcome(archive(tmp_path / "b.nemo", [("model_weights.ckpt", bomb)]))) is HeadFileError
    assert not (tmp_path / "trap").exists()
    (tmp_path / "c.nemo").write_bytes(b"no archive")
    assert type(outcome(tmp_path / "c.nemo")) is HeadFileError
    with tarfile.open(tmp_path / "d.nemo", "w") as file:
        link = tarfile.TarInfo("model_weights.ckpt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert type(outcome(tmp_path / "d.nemo")) is HeadFileError


def test_a_tensor_that_claims_more_than_it_stores(tmp_path):
    huge = torch.zeros(1).expand(1, 1 << 28)
    torch.save({WEIGHT_KEY: huge, BIAS_KEY: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    error = outcome(tmp_path)
    assert type(error) is HeadMismatchError
    assert "expanded torch.float32" in str(error)


@pytest.mark.parametrize(
    ("tensor", "word"), [(torch.ones(1, 8).to_sparse(), "sparse"), (torch.ones(1, 8, device="meta"), "meta")]
)
def test_tensors_without_numbers_in_memory(tmp_path, tensor, word):
    torch.save({WEIGHT_KEY: tensor, BIAS_KEY: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    error = outcome(tmp_path)
    assert isinstance(error, HeadError)
    assert word in str(error) or "pickled tensors" in str(error)


@pytest.mark.parametrize("prefix", [1, "", "a b", "../x", "score.*", ["score"], {}])
def test_a_hostile_value_head_prefix(tmp_path, prefix):
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "value_head_prefix": prefix}))
    error = outcome(tmp_path / "model")
    assert type(error) is HeadFileError
    assert "value_head_prefix: expected a module's name" in str(error)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '"x"'])
def test_a_broken_configuration(tmp_path, text):
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    error = outcome(tmp_path / "model")
    assert type(error) is HeadFileError
    assert "config.json: expected a JSON object" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("RewardModel"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("architectures", "value_head_prefix", "vocab_size", "mean", "std", "var", "do_normalize", "score_type")


@given(config=st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_configuration_gives_the_head_or_an_error(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("configured")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"score.weight": torch.full((1, 8), 0.5)}, folder / "model.safetensors")
    try:
        head = load(folder)
    except HeadError:
        return
    assert torch.equal(head.weight, torch.full((1, 8), 0.5))
    assert all(number is None or isinstance(number, float) for number in (head.mean, head.std))


tensor_names = st.sampled_from(
    [
        f"{prefix}{name}"
        for prefix in ("", "module.", "pretrained_model.", "model.layers.0.")
        for name in (
            *(f"v_head.{part}" for part in ("summary.weight", "summary.bias", "weight", "0.weight", "2.bias")),
            *(f"score.{part}" for part in ("weight", "bias", "0.weight", "0.bias", "2.weight", "2.bias")),
            "rm_head.weight",
            "value_head.weight",
            "lm_head.weight",
            "output_layer.weight",
            "norm.weight",
        )
    ]
)
shapes = st.lists(st.integers(0, 3), max_size=3)


@given(shapes_by_name=st.dictionaries(tensor_names, shapes, max_size=5))
def test_any_names_and_shapes_give_a_head_of_the_file_or_an_error(tmp_path_factory, shapes_by_name):
    folder = tmp_path_factory.mktemp("names")
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes_by_name.items()}
    save_file(state, folder / "model.safetensors")
    try:
        head = find_head(folder)
    except HeadError:
        return
    for layer in () if head is None else head.layers:
        stored = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        assert all(any(torch.equal(tensor, value) for value in state.values()) for tensor in stored)
        assert layer.weight.dim() == 2


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "BOOL", "X", "", 3]),
        "shape": st.lists(st.integers(-1, 1 << 62) | st.sampled_from([1, 8]), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 1 << 62) | st.sampled_from([0, 4, 32, 36]), max_size=3),
    }
)


@given(
    weight=st.just({"dtype": "F32", "shape": [1, 8], "data_offsets": [4, 36]}) | entries,
    bias=st.just({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) | entries | st.none(),
    more=st.dictionaries(st.text(max_size=4), entries | st.integers() | st.text(max_size=3), max_size=2),
)
def test_any_header_gives_the_head_or_an_error(tmp_path_factory, weight, bias, more):
    folder = tmp_path_factory.mktemp("header")
    text = json.dumps({WEIGHT_KEY: weight, **({} if bias is None else {BIAS_KEY: bias}), **more}).encode()
    (folder / "model.safetensors").write_bytes(header(len(text), text) + bytes(36))
    try:
        head = find_head(folder)
    except HeadError:
        return
    assert head is None or (head.weight.tolist() == [[0.0] * 8] and head.bias.tolist() == [0.0])


def test_the_header_property_begins_with_a_header_that_is_right(tmp_path):
    content = save({BIAS_KEY: torch.zeros(1), WEIGHT_KEY: torch.zeros(1, 8)})
    (tmp_path / "model.safetensors").write_bytes(content)
    assert find_head(tmp_path).weight.tolist() == [[0.0] * 8]


class TestFilesOfACheckpoint:
    """Only regular files that belong to a checkpoint are read."""

    @pytest.fixture
    def folder(self, tmp_path):
        shutil.copytree(GOLDEN / "llama_factory_safetensors", tmp_path / "critic")
        return tmp_path / "critic"

    @pytest.mark.parametrize("name", ["value_head.safetensors", "model.safetensors", "config.json"])
    def test_a_link_out_of_the_checkpoint_is_not_followed(self, folder, tmp_path, name):
        secret = tmp_path / "secret"
        secret.write_bytes((GOLDEN / "llama_factory_safetensors" / "value_head.safetensors").read_bytes())
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(HeadFileError, match=f"{name}: expected a file of the checkpoint, found a link to .*secret"):
            regular_file(folder, name)

    def test_a_folder_s_link_that_leads_out_is_not_followed(self, folder, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x.json").write_text("{}")
        (folder / "inner").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(HeadFileError, match="found a link to"):
            regular_file(folder, "inner/x.json")

    def test_a_link_that_stays_inside_is_followed(self, folder):
        (folder / "value_head.safetensors").rename(folder / "head")
        (folder / "value_head.safetensors").symlink_to("head")
        assert torch.equal(load(folder).weight, load(GOLDEN / "llama_factory_safetensors").weight)

    def test_a_snapshot_of_the_hub_s_cache_is_read(self, folder, tmp_path):
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            file.rename(blobs / f"0{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/0{file.name}")
        assert torch.equal(load(snapshot).weight, load(GOLDEN / "llama_factory_safetensors").weight)

    def test_a_link_that_leads_nowhere_is_no_missing_head(self, folder):
        (folder / "value_head.safetensors").unlink()
        (folder / "value_head.safetensors").symlink_to("gone")
        assert type(outcome(folder)) is HeadFileError

    def test_a_link_to_itself(self, folder):
        (folder / "value_head.safetensors").unlink()
        (folder / "value_head.safetensors").symlink_to("value_head.safetensors")
        assert type(outcome(folder)) is HeadFileError

    def test_a_pipe_is_not_opened(self, folder):
        (folder / "value_head.safetensors").unlink()
        os.mkfifo(folder / "value_head.safetensors")
        error = outcome(folder)
        assert type(error) is HeadFileError
        assert "found a pipe or a device" in str(error)

    def test_a_device_is_not_opened(self, folder):
        (folder / "value_head.safetensors").unlink()
        (folder / "value_head.safetensors").symlink_to("/dev/zero")
        assert type(outcome(folder)) is HeadFileError

    def test_a_folder_in_a_file_s_place(self, folder):
        (folder / "model.safetensors").mkdir()
        error = outcome(folder)
        assert type(error) is HeadFileError
        assert "found a folder" in str(error)


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def head_state():
    return {WEIGHT_KEY: torch.randn(1, 8), BIAS_KEY: torch.randn(1)}


@pytest.fixture
def before_torch_2_6(monkeypatch):
    """Where nobody has said yes to pickled files yet."""
    monkeypatch.setattr(vhead.checkpoints.tensor_files, "_SAFE_UNPICKLING", (999,))
    monkeypatch.delenv("VHEAD_ALLOW_PICKLE")


@pytest.fixture
def torch_opens_nothing(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)


class TestPickledFiles:
    """Archives that torch would run, or that become far longer than they are, are told by their content."""

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "value_head.bin", "value_head.pt", "adapter_model.bin"])
    def test_a_torchscript_archive_is_refused_before_torch_opens_it(self, tmp_path, torch_opens_nothing, name):
        (tmp_path / "adapter_config.json").write_text("{}")
        zipped(tmp_path / name, {"x/constants.pkl": b"\x80\x02).", "x/data.pkl": b"\x80\x02).", "x/version": b"3\n"})
        error = outcome(tmp_path)
        assert type(error) is HeadFileError
        assert "got a TorchScript archive, which holds a program" in str(error)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "value_head.bin", "value_head.pt"])
    def test_a_tar_archive_is_refused_before_torch_opens_it(self, tmp_path, torch_opens_nothing, name):
        archive(tmp_path / name, [("pickle", b"\x80\x02}."), ("storages", b""), ("tensors", b"")])
        error = outcome(tmp_path)
        assert type(error) is HeadFileError
        assert "got a tar archive" in str(error)

    def test_the_check_can_fail(self, tmp_path, torch_opens_nothing):
        with pytest.raises(HeadFileError, match=r"torch\.load was called"):
            load(GOLDEN / "trl_adapter")

    def test_a_compressed_archive_is_refused(self, tmp_path, torch_opens_nothing):
        torch.save(head_state(), tmp_path / "plain")
        with zipfile.ZipFile(tmp_path / "plain") as plain:
            members = {name: plain.read(name) for name in plain.namelist()}
        zipped(tmp_path / "pytorch_model.bin", members, zipfile.ZIP_DEFLATED)
        assert "as torch.save writes it, without compression" in str(outcome(tmp_path))

    def test_members_that_share_their_bytes_are_refused(self, tmp_path, torch_opens_nothing):
        path = zipped(tmp_path / "pytorch_model.bin", {f"x/data/{index}": bytes(1000) for index in range(2)})
        content = path.read_bytes()
        start = content.rindex(b"PK\x01\x02")
        # The second member's place becomes the first one's, and both claim more than is there.
        entries = bytearray(content)
        for entry in (content.index(b"PK\x01\x02"), start):
            entries[entry + 20 : entry + 28] = (2000).to_bytes(4, "little") * 2
            entries[entry + 42 : entry + 46] = bytes(4)
        path.write_bytes(entries)
        assert "expected at most" in str(outcome(tmp_path))

    @pytest.mark.parametrize("is_zip", [True, False])
    def test_a_key_that_takes_years_to_hash_is_refused(self, tmp_path, torch_opens_nothing, is_zip):
        pair = b"h\x01h\x01\x86q\x01"
        content = b"\x80\x02)q\x01" + 60 * pair + b"}h\x01K\x01s."
        if is_zip:
            zipped(tmp_path / "pytorch_model.bin", {"x/data.pkl": content, "x/version": b"3\n"})
        else:
            (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02K\x01." + content)
        error = outcome(tmp_path)
        assert type(error) is HeadFileError
        assert "tuples inside tuples" in str(error)

    def test_before_torch_2_6_a_pickled_file_needs_a_yes(self, tmp_path, torch_opens_nothing, before_torch_2_6):
        torch.save(head_state(), tmp_path / "pytorch_model.bin")
        error = outcome(tmp_path)
        assert type(error) is HeadFileError
        assert "VHEAD_ALLOW_PICKLE=1" in str(error)
        archived = outcome(location("nemo_archive"))
        assert type(archived) is HeadFileError
        assert "VHEAD_ALLOW_PICKLE=1" in str(archived)

    def test_before_torch_2_6_the_yes_is_an_environment_variable(self, monkeypatch, before_torch_2_6):
        monkeypatch.setenv("VHEAD_ALLOW_PICKLE", "1")
        assert load(GOLDEN / "trl_adapter").format == "trl"
        monkeypatch.setenv("VHEAD_ALLOW_PICKLE", "yes")
        with pytest.raises(EnvironmentVariableError, match="VHEAD_ALLOW_PICKLE: expected one of 0, 1, got 'yes'"):
            load(GOLDEN / "trl_adapter")

    def test_before_torch_2_6_an_adapter_s_head_is_read_from_safetensors(self, tmp_path, before_torch_2_6):
        state = head_state()
        (tmp_path / "adapter_config.json").write_text("{}")
        save_file(state, tmp_path / "value_head.safetensors")
        torch.save(state, tmp_path / "pytorch_model.bin")
        assert torch.equal(load(tmp_path).weight, state[WEIGHT_KEY])


class TestSizes:
    """What is in a file is compared with the file before anything is allocated for it."""

    def test_a_header_longer_than_any_model_s(self, tmp_path):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write((83_000_000).to_bytes(8, "little"))
            file.truncate(83_000_008)
        error = outcome(tmp_path)
        assert type(error) is HeadFileError
        assert "expected a header of at most 25,000,000 bytes, got one of 83,000,000" in str(error)

    def test_a_head_as_wide_as_a_sparse_file_allows(self, tmp_path):
        size = (2 << 30) + 32
        entry = {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}
        bias = {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}
        text = json.dumps({WEIGHT_KEY: entry, BIAS_KEY: bias}).encode()
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(header(len(text), text))
            file.truncate(8 + len(text) + size + 4)
        error = outcome(tmp_path)
        assert type(error) is HeadMismatchError
        assert "[1, 536870920]" in str(error)

    def test_an_archive_that_becomes_gigabytes(self, tmp_path):
        with tarfile.open(tmp_path / "x.nemo", "w:gz") as file:
            member = tarfile.TarInfo("model_weights.ckpt")
            member.size = 64 << 20
            file.addfile(member, io.BytesIO(bytes(member.size)))
        error = outcome(tmp_path / "x.nemo")
        assert type(error) is HeadFileError
        assert "weights, which hardly compress" in str(error)

    def test_an_archive_whose_member_is_longer_than_itself(self, tmp_path):
        member = tarfile.TarInfo("model_weights.ckpt")
        member.size = 1 << 33
        (tmp_path / "x.nemo").write_bytes(member.tobuf() + bytes(2048))
        assert type(outcome(tmp_path / "x.nemo")) is HeadFileError
