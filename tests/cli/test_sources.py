"""`vhead score` of compressed files, folders, and columns of other names."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.test_cli_score import run
from vhead.rollouts.files.compressed import DecompressedFile, compressed


def text(path):
    return DecompressedFile(path).read().decode()


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
class TestCompressed:
    def test_in_and_out(self, critic, records, tmp_path, suffix):
        plain, packed = tmp_path / "in.jsonl", tmp_path / f"in.jsonl{suffix}"
        plain.write_bytes(lines(records))
        packed.write_bytes(compressed(lines(records), suffix))
        assert run(plain, "-m", critic, "-o", tmp_path / "a.jsonl").exit_code == 0
        assert run(packed, "-m", critic, "-o", tmp_path / f"b.jsonl{suffix}").exit_code == 0
        assert text(tmp_path / f"b.jsonl{suffix}") == (tmp_path / "a.jsonl").read_text()

    def test_a_run_that_stopped_is_continued(self, critic, records, tmp_path, suffix):
        packed, output = tmp_path / f"in.jsonl{suffix}", tmp_path / f"out.jsonl{suffix}"
        options = (packed, "-m", critic, "-o", output, "--batch-invariant", "--chunk-tokens", 64)
        broken = lines(records[:8]) + b"no record\n" + lines(records[8:])
        packed.write_bytes(compressed(broken, suffix))
        done = run(*options)
        assert done.exit_code == 1
        assert "line 9: text: expected a JSON object" in done.stderr
        kept = output.with_name(f"{output.name}.partial")
        finished = tmp_path / f"finished{suffix}"
        finished.write_bytes(kept.read_bytes())
        assert text(finished).count("\n") == 8
        # What a kill leaves behind the last note.
        kept.write_bytes(kept.read_bytes() + b"half a stream")
        packed.write_bytes(compressed(lines(records), suffix))
        assert run(*options, "--resume").exit_code == 0
        whole = tmp_path / f"whole.jsonl{suffix}"
        assert run(packed, "-m", critic, "-o", whole, *options[5:]).exit_code == 0
        assert text(output) == text(whole)
        assert "finished already" in run(*options, "--resume").stderr


class TestFolder:
    @pytest.fixture
    def folder(self, records, tmp_path):
        (tmp_path / "in").mkdir()
        for name, part in (("b", records[5:]), ("a", records[:5])):
            pq.write_table(pa.Table.from_pylist(part), tmp_path / "in" / f"{name}.parquet")
        return tmp_path / "in"

    @pytest.mark.parametrize("name", ["in", "in/*.parquet"])
    def test_it_is_scored_as_one(self, critic, folder, records, tmp_path, name):
        output = tmp_path / "out.parquet"
        assert run(tmp_path / name, "-m", critic, "-o", output).exit_code == 0
        assert pq.read_table(output).column("id").to_pylist() == [record["id"] for record in records]
        assert "finished already" in run(tmp_path / name, "-m", critic, "-o", output, "--resume").stderr

    def test_another_first_file_is_another_input(self, critic, folder, records, tmp_path):
        output = tmp_path / "out.jsonl"
        assert run(folder, "-m", critic, "-o", output).exit_code == 0
        pq.write_table(pa.Table.from_pylist(records[1:6]), folder / "a.parquet")
        done = run(folder, "-m", critic, "-o", output, "--resume")
        assert done.exit_code == 1
        assert (
            "expected the 12 records that the earlier run finished, got others up to row 7 of b.parquet" in done.stderr
        )

    def test_an_output_within_it_would_be_an_input_the_next_time(self, critic, folder):
        done = run(folder, "-m", critic, "-o", folder / "out.parquet")
        assert done.exit_code == 2
        assert "lies in the input's folder" in done.stderr

    def test_an_empty_one(self, critic, tmp_path):
        done = run(tmp_path, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 2
        assert "expected a folder or a pattern with .parquet files, got none" in done.stderr


class TestFields:
    def test_columns_of_other_names(self, critic, records, tmp_path):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        renamed = [{"q": record["prompt"], "r": record["completion"]} for record in records]
        source.write_bytes(lines(renamed))
        assert run(source, "-m", critic, "-o", "-", "--fields", "prompt=q").exit_code == 1
        done = run(
            tmp_path / "in.jsonl", "-m", critic, "-o", tmp_path / "out.jsonl", "--fields", "prompt=q,completion=r"
        )
        assert done.exit_code == 0
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert [list(line) for line in written] == [["q", "r", "values", "logprobs", "reward"]] * len(records)
        done = run(
            tmp_path / "in.jsonl", "-m", critic, "-o", tmp_path / "out.jsonl", "--fields", "prompt=r", "--resume"
        )
        assert "fields: expected {'prompt': 'q', 'completion': 'r'}" in done.stderr

    def test_what_is_no_field(self, critic, tmp_path):
        (tmp_path / "in.jsonl").write_bytes(b"{}\n")
        done = run(tmp_path / "in.jsonl", "-m", critic, "-o", "-", "--fields", "question=prompt")
        assert done.exit_code == 2
        assert "expected some of id, messages" in done.stderr


def test_gzip_of_other_writers_is_read(critic, records, tmp_path):
    with gzip.open(tmp_path / "in.jsonl.gz", "wb") as file:
        file.write(lines(records))
    assert run(tmp_path / "in.jsonl.gz", "-m", critic, "-o", tmp_path / "out.parquet").exit_code == 0
