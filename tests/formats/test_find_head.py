"""Golden files of every known format give their head; hostile and broken files give an error and nothing else."""

import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tests.formats.golden import EXPECTED, GOLDEN
from vhead.errors import HeadError, HeadFileError, HeadMismatchError
from vhead.formats import BIAS_KEY, WEIGHT_KEY, find_head

BIAS = EXPECTED["trl_adapter"]["layers"][0]["bias"]


def head_state(width=8):
    generator = torch.Generator().manual_seed(5)
    return {
        WEIGHT_KEY: torch.randn(1, width, generator=generator),
        BIAS_KEY: torch.randn(1, generator=generator),
    }


def test_nothing_there_is_no_head(tmp_path):
    assert find_head(tmp_path) is None
    assert find_head(tmp_path / "nowhere") is None
    assert find_head("not/a/repository/name") is None


def test_one_file_can_be_named():
    file = GOLDEN / "llama_factory_safetensors" / "value_head.safetensors"
    head = find_head(file)
    assert head.bias.tolist() == BIAS
    assert head.source == f"{file} (trl)"
    assert find_head(GOLDEN / "trl_adapter" / "pytorch_model.bin").bias.tolist() == BIAS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_of_other_dtypes_become_float32(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in head_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    head = find_head(tmp_path)
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, state[WEIGHT_KEY].float())


@pytest.mark.parametrize("root", ["module.", "model.", "_orig_mod."])
def test_raw_module_saves_have_a_prefix(tmp_path, root):
    state = {f"{root}{name}": value for name, value in head_state().items()}
    save_file({**state, f"{root}pretrained_model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert torch.equal(find_head(tmp_path).weight, head_state()[WEIGHT_KEY])


def test_variants_and_the_kind_of_file_can_be_chosen(tmp_path):
    save_file(head_state(4), tmp_path / "model.safetensors")
    save_file(head_state(5), tmp_path / "model.fp16.safetensors")
    torch.save(head_state(6), tmp_path / "pytorch_model.bin")
    assert find_head(tmp_path).weight.shape == (1, 4)
    assert find_head(tmp_path, variant="fp16").weight.shape == (1, 5)
    assert find_head(tmp_path, use_safetensors=False).weight.shape == (1, 6)


def test_the_read_tensors_do_not_hold_the_file(tmp_path):
    for name, write in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        write({**head_state(), "big": torch.zeros(100_000)}, folder / name)
        head = find_head(folder)
        assert head.weight.untyped_storage().nbytes() == 8 * 4
        os.truncate(folder / name, 0)
        assert torch.equal(head.weight, head_state()[WEIGHT_KEY])


MISFITS = {
    "critic_head.weight": torch.ones(1, 8),
    "model.v_head.value.weight": torch.ones(1, 8),
    "score.summary.weight": torch.ones(1, 8),
    "model.score.1.weight": torch.ones(1, 8),
    "value_head.summary.weight": torch.ones(1, 8),
    "valuehead.weight": torch.ones(1, 8),
    "regression_head.weight": torch.ones(1, 8),
    "model.regression_head.dense.weight": torch.ones(1, 8),
    "rank_head.weight": torch.ones(1, 8),
    "regression_layer.weight": torch.ones(1, 8),
    "reward.weight": torch.ones(1, 8),
    "model.reward.2.weight": torch.ones(1, 8),
    "value.weight": torch.ones(1, 8),
    "module.value_function.weight": torch.ones(1, 8),
    "critic.weight": torch.ones(1, 8),
}


@pytest.mark.parametrize("name", MISFITS)
def test_something_head_like_is_never_passed_over(tmp_path, name):
    save_file({name: MISFITS[name], "model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(HeadMismatchError) as error:
        find_head(tmp_path)
    assert f"found {name} {list(MISFITS[name].shape)}" in str(error.value)
    assert f"{WEIGHT_KEY} [1, H]" in str(error.value)
    assert "norm" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "lm_head.weight",
        "model.layers.0.e_score_correction_bias",
        "model.layers.0.score.weight",
        "model.score_norm.weight",
        "transformer.output_layer.weight",
        "vision.classifier.weight",
        "bert.encoder.layer.0.attention.self.value.weight",
        "model.layers.0.attention.value_layer.weight",
        "model.layers.0.self_attn.value_proj.weight",
        "critic.model.norm.weight",
        "value_model.model.norm.weight",
    ],
)
def test_what_only_sounds_like_a_head_is_not_one(tmp_path, name):
    save_file({name: torch.ones(4)}, tmp_path / "model.safetensors")
    assert find_head(tmp_path) is None


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ((2, 8), (1,)),
        ((0, 8), (0,)),
        ((1, 0), (1,)),
        ((8,), (1,)),
        ((1, 1, 8), (1,)),
        ((8, 1), (1,)),
        ((1, 8), (1, 1)),
        ((1, 8), ()),
    ],
)
@pytest.mark.parametrize("write", [save_file, torch.save], ids=["model.safetensors", "pytorch_model.bin"])
def test_other_shapes_do_not_fit(tmp_path, weight, bias, write):
    name = "model.safetensors" if write is save_file else "pytorch_model.bin"
    write({WEIGHT_KEY: torch.ones(weight), BIAS_KEY: torch.ones(bias)}, tmp_path / name)
    with pytest.raises(HeadMismatchError) as error:
        find_head(tmp_path)
    assert f"{WEIGHT_KEY} {list(weight)}" in str(error.value)
    assert f"{BIAS_KEY} {list(bias)}" in str(error.value)


def test_two_heads_are_one_too_many(tmp_path):
    state = head_state()
    save_file({**state, **{f"other.{k}": v + 1 for k, v in state.items()}}, tmp_path / "model.safetensors")
    with pytest.raises(HeadMismatchError, match=r"other\.v_head"):
        find_head(tmp_path)


def test_a_llama_factory_file_with_other_tensors_does_not_fit(tmp_path):
    save_file({"something.weight": torch.ones(2)}, tmp_path / "value_head.safetensors")
    with pytest.raises(HeadMismatchError, match=r"something\.weight \[2\]"):
        find_head(tmp_path)
    save_file({}, tmp_path / "value_head.safetensors")
    with pytest.raises(HeadMismatchError, match="found nothing"):
        find_head(tmp_path)


def header(length, text=b""):
    return struct.pack("<Q", length) + text


def metadata(**entry):
    text = json.dumps({WEIGHT_KEY: {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]} | entry}).encode()
    return header(len(text), text)


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "header longer than the file": header(1 << 20, b"{}"),
    "header of an exabyte": header((1 << 63) - 1, b"{}"),
    "no JSON": header(4, b"abcd"),
    "deep JSON": header(40_000, b"[" * 40_000),
    "a list": header(2, b"[]"),
    "not UTF-8": header(4, b"\xff\xfe\xfd\xfc"),
    "offsets outside the file": metadata(data_offsets=[0, 1 << 40]) + bytes(32),
    "offsets backwards": metadata(data_offsets=[32, 0]) + bytes(32),
    "a shape that overflows": metadata(shape=[1 << 62, 1 << 62]) + bytes(32),
    "a shape that is not its bytes": metadata(shape=[1, 9]) + bytes(32),
    "a negative shape": metadata(shape=[-1, -8]) + bytes(32),
    "an unknown dtype": metadata(dtype="F3") + bytes(32),
    "bytes missing": metadata() + bytes(31),
    "bytes to spare": metadata() + bytes(33),
    "pickle": pickle.dumps({WEIGHT_KEY: [1.0]}),
    "zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.safetensors"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HeadFileError) as error:
        find_head(tmp_path)
    assert name in str(error.value)
    assert isinstance(pickle.loads(pickle.dumps(error.value)), HeadFileError)


@pytest.mark.parametrize("keep", range(0, len(save(head_state())), 8))
def test_every_truncation_is_an_error(tmp_path, keep):
    (tmp_path / "model.safetensors").write_bytes(save(head_state())[:keep])
    with pytest.raises(HeadFileError):
        find_head(tmp_path)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_head_or_an_error(tmp_path_factory, position, value):
    content = bytearray(save(head_state()))
    content[position % len(content)] = value
    folder = tmp_path_factory.mktemp("changed")
    (folder / "model.safetensors").write_bytes(content)
    try:
        head = find_head(folder)
    except HeadError:
        return
    assert head is None or head.weight.shape == (1, 8)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "value_head.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, name, zipped):
    trap = tmp_path / "trap"
    torch.save({**head_state(), "bomb": Bomb(trap)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(HeadFileError, match=name):
        find_head(tmp_path)
    assert not trap.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert trap.exists(), "the trap does not work, so the test proves nothing"


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04junk", b"\x80\x02}q\x00.", b"not a pickle", b"\x80\x05K\x01."]
)
def test_broken_pickles(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(HeadFileError, match=r"pytorch_model\.bin"):
        find_head(tmp_path)


def test_a_truncated_archive(tmp_path):
    torch.save(head_state(), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(HeadFileError):
        find_head(tmp_path)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("something", "else")
    with pytest.raises(HeadFileError):
        find_head(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], torch.ones(3), "text"])
def test_a_pickle_without_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadFileError, match="dictionary"):
        find_head(tmp_path)


def test_old_style_pickles_load(tmp_path):
    torch.save(head_state(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(find_head(tmp_path).weight, head_state()[WEIGHT_KEY])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": [1]}',
        '{"weight_map": "x"}',
        "[" * 100_000,
        json.dumps({"weight_map": {WEIGHT_KEY: "../model.safetensors"}}),
        json.dumps({"weight_map": {WEIGHT_KEY: "/etc/passwd"}}),
        json.dumps({"weight_map": {WEIGHT_KEY: "sub/model.safetensors"}}),
        json.dumps({"weight_map": {WEIGHT_KEY: ".."}}),
        json.dumps({"weight_map": {WEIGHT_KEY: ""}}),
        json.dumps({"weight_map": {WEIGHT_KEY: "..\\model.safetensors"}}),
    ],
)
def test_hostile_indexes(tmp_path, text):
    (tmp_path / "folder").mkdir()
    save_file(head_state(), tmp_path / "model.safetensors")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(HeadFileError, match=r"index\.json"):
        find_head(tmp_path / "folder")


def test_a_missing_shard_and_an_index_that_lies(tmp_path):
    shutil.copytree(GOLDEN / "trl_sharded", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[WEIGHT_KEY])
    index.write_text(json.dumps({"weight_map": {**weight_map, WEIGHT_KEY: other}}))
    with pytest.raises(HeadFileError, match=f"{WEIGHT_KEY}.*missing"):
        find_head(tmp_path / "model")
    index.write_text(json.dumps({"weight_map": {**weight_map, WEIGHT_KEY: "model-9.safetensors"}}))
    with pytest.raises(HeadFileError, match=r"model-9\.safetensors"):
        find_head(tmp_path / "model")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_classifier_s_adapter_holds_its_head(tmp_path, file):
    write = save_file if file.endswith("safetensors") else torch.save
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)}
    write(lora, tmp_path / file)
    assert find_head(tmp_path) is None
    score = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    write({**lora, "base_model.model.score.weight": score}, tmp_path / file)
    head = find_head(tmp_path)
    assert torch.equal(head.weight, score)
    assert head.format == "hf-token-classification"
    # A head of the model's own stands before the adapter's.
    torch.save(head_state(), tmp_path / "pytorch_model.bin")
    assert torch.equal(find_head(tmp_path).weight, head_state()[WEIGHT_KEY])


@pytest.mark.parametrize(
    "name", ["model.nemo", "critic.pt", "value_model-00001-of-00002.safetensors", "reward_head.bin"]
)
def test_a_head_in_a_file_that_no_format_knows_is_named(tmp_path, name):
    save_file({"model.norm.weight": torch.randn(8)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(HeadMismatchError, match=f"found none there, but {name} may hold one; name that file itself"):
        find_head(tmp_path)


def test_a_head_of_slime_in_a_folder_is_named_and_read_by_its_name(tmp_path):
    shutil.copytree(GOLDEN / "slime", tmp_path / "slime")
    with pytest.raises(HeadMismatchError, match=r"model_optim_rng\.pt may hold one"):
        find_head(tmp_path / "slime")
    assert find_head(tmp_path / "slime" / "model_optim_rng.pt").format == "megatron"


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "critic_optimizer.pt", "rng_state_0.pth", "consolidated.00.pth"]
)
def test_other_files_beside_a_model_are_no_heads(tmp_path, name):
    save_file({"model.norm.weight": torch.randn(8)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(b"x")
    assert find_head(tmp_path) is None
