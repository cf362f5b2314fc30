"""Inputs of several files, compressed ones, and those of the hub."""

import gzip
import json
import random
from contextlib import closing

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vhead.errors import FieldError, FileFormatError
from vhead.rollouts.files import jsonl
from vhead.rollouts.files.compressed import compressed
from vhead.rollouts.files.opening import open_reader
from vhead.rollouts.files.sources import input_files

RECORDS = [{"id": at, "prompt": f"{random.Random(at).random()}", "completion": "b" * (1 + at)} for at in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


def ids(rows):
    return [row.rollouts()[0].id for row in rows]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
class TestCompressed:
    @pytest.fixture
    def path(self, tmp_path, suffix):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compressed(LINES, suffix))
        return path

    def test_the_records_and_their_digests_are_those_of_the_lines(self, path, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(LINES)
        with closing(open_reader(str(tmp_path / "a.jsonl"))) as reader:
            plain, packed = list(reader), list(open_reader(str(path)))
        assert [row.json_object() for row in packed] == [row.json_object() for row in plain]
        assert [row.digest for row in packed] == [row.digest for row in plain]

    def test_positions_are_bytes_of_the_file(self, path):
        reader = open_reader(str(path))
        positions = [row.position for row in reader]
        assert positions == sorted(positions)
        assert 0 < positions[0] <= positions[-1] == reader.size == path.stat().st_size

    def test_several_streams_follow_each_other(self, path, suffix):
        half = len(LINES) // 2
        path.write_bytes(compressed(LINES[:half], suffix) + compressed(LINES[half:], suffix))
        assert ids(open_reader(str(path))) == list(range(40))

    def test_a_file_that_ends_early_gives_its_first_records(self, path):
        noise = [{"id": at, "prompt": random.Random(at).randbytes(500_000).hex(), "completion": "b"} for at in range(4)]
        content = compressed("".join(json.dumps(record) + "\n" for record in noise).encode(), path.suffix)
        path.write_bytes(content[: len(content) * 3 // 4])
        rows = iter(open_reader(str(path)))
        assert next(rows).rollouts()[0].id == 0
        with pytest.raises(FileFormatError, match=rf"{path.name}: the compressed file is broken"):
            list(rows)

    @pytest.mark.parametrize("content", [b"no such thing at all", LINES])
    def test_what_is_not_compressed_is_named(self, path, content):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=rf"{path.name}: the compressed file is broken"):
            list(open_reader(str(path)))

    def test_a_line_without_end_is_refused_and_never_held(self, path, suffix, monkeypatch):
        """Some kilobytes may stand for gigabytes."""
        monkeypatch.setattr(jsonl, "LONGEST_LINE", 2**16)
        path.write_bytes(b"".join([compressed(b" " * 2**22 + b"x" * 2**22, suffix), compressed(b"\n" + LINES, suffix)]))
        rows = list(open_reader(str(path)))
        with pytest.raises(FieldError, match="line 1: text: expected a line of less than 65,536 bytes"):
            rows[0].rollouts()[0]
        assert len(rows[0].line) <= 2**16
        assert ids(rows[1:]) == list(range(40))


def test_gzip_s_own_files_are_read(tmp_path):
    with gzip.open(tmp_path / "a.JSONL.GZ", "wb") as file:
        file.write(LINES)
    assert ids(open_reader(str(tmp_path / "a.JSONL.GZ"))) == list(range(40))


class TestSeveralFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        write(tmp_path / "data" / "b.parquet", RECORDS[10:30])
        write(tmp_path / "data" / "c.parquet", RECORDS[30:])
        write(tmp_path / "data" / "a.parquet", RECORDS[:10])
        write(tmp_path / "data" / ".a.parquet", RECORDS)
        write(tmp_path / "data" / "_b.parquet", RECORDS)
        (tmp_path / "data" / "README.md").write_text("# Data")
        return tmp_path / "data"

    def test_a_folder_is_one_input_in_sorted_order(self, folder):
        reader = open_reader(str(folder))
        rows = list(reader)
        assert ids(rows) == list(range(40))
        assert [row.count for row in rows] == [row.position for row in rows] == list(range(1, 41))
        assert reader.size == 40
        assert (rows[9].where, rows[10].where) == ("row 10 of a.parquet", "row 1 of b.parquet")
        reader.close()

    def test_a_pattern(self, folder):
        assert ids(open_reader(str(folder / "[bc].parquet"))) == list(range(10, 40))
        assert ids(open_reader(str(folder / "c*.parquet"))) == list(range(30, 40))

    def test_a_folder_of_one_file(self, folder):
        for name in ("b", "c"):
            (folder / f"{name}.parquet").unlink()
        assert ids(open_reader(str(folder))) == list(range(10))

    def test_the_digest_of_a_record_depends_on_the_files_before_it(self, folder):
        before = [row.digest for row in open_reader(str(folder))]
        write(folder / "a.parquet", RECORDS[1:11])
        after = [row.digest for row in open_reader(str(folder))]
        assert len(set(before)) == 3
        assert not set(before) & set(after)

    def test_another_last_file_leaves_the_digests_before_it(self, folder):
        before = [row.digest for row in open_reader(str(folder))]
        write(folder / "c.parquet", RECORDS[29:39])
        after = [row.digest for row in open_reader(str(folder))]
        assert before[:30] == after[:30]
        assert before[-1] != after[-1]

    def test_columns_in_another_order(self, folder):
        write(folder / "b.parquet", [dict(reversed(record.items())) for record in RECORDS[10:30]])
        rows = list(open_reader(str(folder)))
        assert ids(rows) == list(range(40))
        assert {tuple(row.batch.schema.names) for row in rows} == {("id", "prompt", "completion")}

    @pytest.mark.parametrize(
        "record", [{"id": "text", "prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}], ids=str
    )
    def test_other_columns_name_the_file(self, folder, record):
        write(folder / "b.parquet", [record])
        with pytest.raises(FileFormatError, match=r"b\.parquet: expected the columns of .*a\.parquet \(id: int64, "):
            open_reader(str(folder))

    def test_a_file_that_is_written_anew_meanwhile(self, folder):
        rows = iter(open_reader(str(folder)))
        assert next(rows).count == 1
        write(folder / "c.parquet", RECORDS[30:31])
        with pytest.raises(FileFormatError, match=r"c\.parquet: expected the file that was there at first"):
            list(rows)

    def test_an_empty_folder(self, tmp_path):
        for name in (tmp_path, tmp_path / "*.parquet"):
            with pytest.raises(FileFormatError, match=r"expected a folder or a pattern with \.parquet files, got none"):
                open_reader(str(name))

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            open_reader(str(tmp_path / "a.parquet"))


class TestHub:
    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        files = [
            "README.md",
            "data/b.parquet",
            "data/a.parquet",
            "data/deep/c.parquet",
            "a.jsonl.gz",
            "data/_d.parquet",
        ]
        asked = []

        def download(filename, repo_id, repo_type, revision):
            asked.append((repo_id, repo_type, revision, filename))
            return str(tmp_path / filename)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, **_: files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    @pytest.mark.parametrize(
        ("within", "files"),
        [
            ("data", ["data/a.parquet", "data/b.parquet"]),
            ("data/", ["data/a.parquet", "data/b.parquet"]),
            ("data/*.parquet", ["data/_d.parquet", "data/a.parquet", "data/b.parquet"]),
            ("*/*/c.parquet", ["data/deep/c.parquet"]),
            ("data/b.parquet", ["data/b.parquet"]),
            ("a.jsonl.gz", ["a.jsonl.gz"]),
        ],
    )
    def test_files_of_a_data_set(self, asked, tmp_path, within, files):
        assert input_files(f"hf://datasets/me/traces@v2/{within}") == [tmp_path / file for file in files]
        assert asked == [("me/traces", "dataset", "v2", file) for file in files]

    def test_without_a_revision(self, asked):
        input_files("hf://datasets/me/traces/a.jsonl.gz")
        assert asked == [("me/traces", "dataset", None, "a.jsonl.gz")]

    def test_nothing_of_that_name(self, asked):
        with pytest.raises(FileFormatError, match=r"hf://datasets/me/traces/no: expected a folder or a pattern with"):
            input_files("hf://datasets/me/traces/no")

    @pytest.mark.parametrize("name", ["hf://me/traces/a", "hf://datasets/me", "hf://datasets/me/traces", "hf://"])
    def test_other_forms(self, asked, name):
        with pytest.raises(FileFormatError, match="expected hf://datasets/OWNER/NAME/PATH, got another form"):
            input_files(name)

    def test_a_hub_that_cannot_be_reached_is_named(self, monkeypatch):
        def fail(self, **_):
            raise RuntimeError("no network")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
        with pytest.raises(OSError, match="hf://datasets/me/traces/a: cannot be loaded: RuntimeError: no network"):
            input_files("hf://datasets/me/traces/a")


def test_compressing_is_the_same_each_time():
    data = np.random.default_rng(3).bytes(1000)
    for suffix in (".gz", ".zst"):
        assert compressed(data, suffix) == compressed(data, suffix)
