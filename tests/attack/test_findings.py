"""What a fresh attacker found with the wheel: each finding once, in its smallest form."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.typer_runner import RUNNER
from vhead import Rollout, Scorer
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.config_bounds import check_config
from vhead.checkpoints.identity import identity
from vhead.cli.app import app
from vhead.demo import demo_model_path
from vhead.errors import FieldError, FileFormatError, HeadFileError, LoadError
from vhead.formats import find_head
from vhead.modeling.adapters import find_adapter
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.rollouts.files.opening import open_reader


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(demo_model_path(), tmp_path / "model")


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": {"": "evil/repo"}},
        {"text_config": {"_attn_implementation": {"vision": "evil/repo"}}},
        {"attention_types": [[["global"], 10**9]]},
        {"r": 5_000_000},
        {"num_virtual_tokens": 5_000_000},
        {"extra_ids": 10**9},
    ],
    ids=str,
)
def test_what_a_dictionary_or_a_list_hides_is_seen(config):
    with pytest.raises(LoadError):
        check_config(config, "somewhere")
    check_config({"attn_implementation": {"": "sdpa"}, "attention_types": [[["global"], 6]], "r": 8}, "somewhere")


def test_an_adapter_is_looked_at_before_its_language_model_is_loaded(tmp_path):
    save_file({"a": torch.randn(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 5_000_000, "base_model_name_or_path": "unused"}))
    with pytest.raises(LoadError, match=r"adapter_config\.json: r: expected at most 100,000, got 5,000,000"):
        find_adapter(Checkpoint(tmp_path))


def test_code_of_the_hub_runs_where_it_is_allowed():
    check_config({"attn_implementation": {"": "kernels-community/flash"}}, "somewhere", runs_code=True)


@pytest.mark.parametrize("name", ["../secret/tokenizer.1.0.0.json", "/secret/tokenizer.1.0.0.json"])
@pytest.mark.parametrize("key", ["fast_tokenizer_files", "vocab_file", "tokenizer_file"])
def test_a_tokenizer_s_files_are_its_folder_s_own(model, key, name):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {key: [name] if key.endswith("s") else name}))
    with pytest.raises(LoadError, match=rf"expected the name of a file of this folder, got '{name}'; delete"):
        Scorer.from_pretrained(model, device="cpu")


def test_what_a_link_shows_from_elsewhere_is_not_read(model):
    (model / "NOTES").symlink_to("/proc/self/pagemap")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "default.jinja").write_text("{{ 1 }}")
    found = identity(str(model), "model")
    assert "model file NOTES" not in found
    assert "model file config.json" in found
    (model / "additional_chat_templates" / "default.jinja").write_text("{{ 2 }}")
    assert identity(str(model), "model") != found


def test_an_adapter_that_names_itself_is_no_end_of_the_stack(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert list(identity(str(tmp_path), "model")) == ["model file adapter_config.json"]


def test_a_pickle_that_makes_bytes_of_a_number_is_refused(tmp_path):
    data = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x04\x00\x5e\xd0\xb2\x85Rs."
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(HeadFileError, match="expected pickled tensors, got a bytearray"):
        find_head(tmp_path)


def test_the_part_of_the_output_is_no_input(tmp_path):
    part = tmp_path / "out.jsonl.partial"
    part.write_text('{"prompt_ids": [1], "completion_ids": [2]}\n')
    (tmp_path / "in.jsonl").symlink_to(part)
    command = ["score", str(tmp_path / "in.jsonl"), "-m", "unused", "-o", str(tmp_path / "out.jsonl"), "--overwrite"]
    assert RUNNER.invoke(app, command).exit_code == 2
    assert part.stat().st_size


@pytest.mark.parametrize("suffix", ["_\udcff", "a\nb", "\0"])
def test_a_suffix_is_text_that_can_be_printed(tmp_path, suffix):
    (tmp_path / "in.jsonl").write_text('{"prompt_ids": [1], "completion_ids": [2]}\n')
    command = [
        "score",
        str(tmp_path / "in.jsonl"),
        "-m",
        "unused",
        "-o",
        str(tmp_path / "o.parquet"),
        "--suffix",
        suffix,
    ]
    assert RUNNER.invoke(app, command).exit_code == 2


def test_a_limit_below_what_is_done_is_refused(tmp_path, model):
    records = [json.dumps({"prompt_ids": [1, 2], "completion_ids": [3]}) for _ in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join([*records, "broken"]) + "\n")
    command = ["score", str(tmp_path / "in.jsonl"), "-m", str(model), "-o", str(tmp_path / "out.jsonl")]
    assert RUNNER.invoke(app, command).exit_code == 1
    done = RUNNER.invoke(app, [*command, "--resume", "--limit", "2"])
    assert done.exit_code == 1
    assert "limit: expected at least the 3 records that are done, got 2" in done.stderr


def test_another_file_of_the_same_name_is_noticed(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("in", "other"):
        pq.write_table(pa.table({"prompt_ids": [[1]], "completion_ids": [[2]]}), tmp_path / f"{name}.parquet")
    reader = open_reader(str(tmp_path / "in.parquet"))
    row = next(iter(reader))
    (tmp_path / "other.parquet").replace(tmp_path / "in.parquet")
    with pytest.raises(FileFormatError, match="expected the file that is being read"):
        _ = row.digest
    reader.close()


@pytest.mark.parametrize(
    ("text", "said"), [('{"z": 1, "z": 2}', "each name once"), ('{"x": 1e-400}', "within the range")]
)
def test_what_parquet_would_change_in_silence_is_an_error(text, said):
    (row,) = JsonlReader(io.BytesIO(text.encode() + b"\n"))
    with pytest.raises(FieldError, match=said):
        row.columns()
    (row,) = JsonlReader(io.BytesIO(b'{"z": 0.0, "y": -0e5, "x": 1e-300}\n'))
    assert row.columns() == {"z": 0.0, "y": 0.0, "x": 1e-300}


@pytest.mark.parametrize(
    "ids",
    [
        np.ma.array([1, 2, 99], mask=[0, 0, 1]),
        [np.array(True), 5],
        [torch.tensor(True), 5],
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.eye(2, dtype=torch.int64).to_sparse(),
        torch.empty(2, dtype=torch.int64, device="meta"),
    ],
    ids=["masked", "array of a bool", "tensor of a bool", "bfloat16", "sparse", "meta"],
)
def test_what_is_no_list_of_ids_is_refused_by_name(ids):
    with pytest.raises(FieldError, match="prompt"):
        Rollout(ids, [1])
    assert Rollout([np.int64(3), np.array(4), torch.tensor(5)], [1]).prompt.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    "option", [{"num_threads": True}, {"max_length": "5"}, {"batch_invariant": "no"}, {"token_budget": 1.5}], ids=str
)
def test_an_option_of_another_type_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(TypeError, match=f"{name}: expected"):
        Scorer(None, **option)


def test_a_checkpoint_s_json_is_an_object(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(HeadFileError, match="expected a JSON object, got a list"):
        Checkpoint(tmp_path).json_object("tokenizer_config.json")
