"""What every format does with a head that is broken: the right error, never another head than the one in the file."""

import io
import json
import shutil
import tarfile

import pytest
import torch
from golden import EXPECTED, GOLDEN, layers, location
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from test_find_head import Bomb, header

from vhead.errors import HeadError, HeadFileError, HeadMismatchError
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
    assert type(outcome(tmp_path)) is HeadFileError
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
    huge = torch.zeros(1).expand(1, 1 << 40)
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
