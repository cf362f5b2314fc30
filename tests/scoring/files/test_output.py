"""Outputs: whole under their names or not there, one run's at a time, and continued only by the same run."""

import errno
import fcntl
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.scoring.files.score_file_cases import (
    GOOD,
    Stopped,
    begun,
    content,
    lines_of,
    put,
    read,
    scores_of,
    stop_after,
    write_in_chunks,
)
from vhead.errors import FieldError, OutputBusyError, OutputError, ResumeError
from vhead.scoring.files.opening import open_output

ROWS = lines_of(*({"n": number} for number in range(6)))
both_formats = pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])


def names(folder):
    return sorted(os.listdir(folder))


def journal_of(path):
    return path.with_name(f".{path.name}.journal")


@both_formats
class TestPublishing:
    def test_the_name_appears_when_the_file_is_complete(self, tmp_path, name):
        path = tmp_path / name
        path.write_text("old\n")
        with begun(path, overwrite=True) as output:
            write_in_chunks(output, ROWS)
            assert path.read_text() == "old\n"
            assert output.partial.stat().st_size
            output.publish(ROWS[-1], scores_of())
        assert [record["n"] for record in content(path)] == [0, 1, 2, 3, 4, 5]
        assert names(tmp_path) == [f".{name}.journal", name]

    def test_a_part_is_kept_when_a_run_stops(self, tmp_path, name):
        stop_after(tmp_path / name, ROWS[:2])
        assert names(tmp_path) == [f".{name}.journal", f"{name}.partial"]

    def test_nothing_is_left_of_nothing(self, tmp_path, name):
        with suppress(Stopped), begun(tmp_path / name):
            raise Stopped
        with suppress(Stopped), open_output(str(tmp_path / name)):
            raise Stopped
        assert names(tmp_path) == []

    @pytest.mark.parametrize("size", [0, 40])
    def test_nothing_is_left_of_nothing_on_a_full_disk(self, tmp_path, name, size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # What a full disk is to the program: writing fails after some bytes. Python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="File too large"), open_output(str(tmp_path / name)) as output:
                output.begin({})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == []

    def test_no_records_are_a_complete_file(self, tmp_path, name):
        put(tmp_path / name, [])
        assert content(tmp_path / name) == []

    def test_a_suffix_names_the_new_columns(self, tmp_path, name):
        rows = lines_of({"values": 5, "reward": "old"})
        put(tmp_path / name, rows, suffix="_b")
        (record,) = content(tmp_path / name)
        assert list(record) == ["prompt", "completion", "values", "reward", "values_b", "reward_b"]
        assert record["values"] == 5

    def test_a_record_that_cannot_be_written_is_an_error_after_those_before_it(self, tmp_path, name):
        rows = [*ROWS[:2], Unwritable(), *ROWS[3:]]
        with pytest.raises(FieldError, match="line 3: n: expected"), begun(tmp_path / name) as output:
            write_in_chunks(output, rows, 6)
        put(tmp_path / name, ROWS[2:], resume=True)
        assert [record["n"] for record in content(tmp_path / name)] == [0, 1, 2, 3, 4, 5]

    def test_a_record_that_cannot_be_written_is_left_out_when_skipped(self, tmp_path, name):
        rows = [*ROWS[:2], Unwritable(), *ROWS[3:]]
        (error,) = put(tmp_path / name, rows, 6, skips=True)
        assert str(error) == "line 3: n: expected something else, got this"
        assert [record["n"] for record in content(tmp_path / name)] == [0, 1, 3, 4, 5]


class Unwritable:
    """A record that no format can hold."""

    where, count, position, digest = "line 3", 3, 3, ROWS[2].digest

    def columns(self):
        raise FieldError(self.where, "n", expected="something else", got="this")

    json_object = columns


@both_formats
class TestWhatIsThere:
    def test_a_finished_output_is_not_overwritten_unasked(self, tmp_path, name):
        put(tmp_path / name, ROWS[:3])
        with pytest.raises(OutputError, match="expected no such file yet; replace it with --overwrite"):
            open_output(str(tmp_path / name))
        assert len(content(tmp_path / name)) == 3
        assert names(tmp_path) == [f".{name}.journal", name]
        put(tmp_path / name, ROWS, overwrite=True)
        assert len(content(tmp_path / name)) == 6

    def test_a_finished_output_of_the_same_run_is_finished(self, tmp_path, name):
        put(tmp_path / name, ROWS)
        before = (tmp_path / name).read_bytes()
        with begun(tmp_path / name, resume=True) as output:
            assert output.finished
            assert output.journal.records == 6
            output.journal.check_whole(iter(ROWS), name)
            with pytest.raises(
                ResumeError, match="expected an input of the 6 records that are finished, got more: line 7"
            ):
                output.journal.check_whole(iter(lines_of(*({"n": number} for number in range(7)))), name)
            with pytest.raises(ResumeError, match="got others up to line 6"):
                output.journal.check_whole(iter(lines_of(*({"n": number} for number in range(1, 7)))), name)
        assert (tmp_path / name).read_bytes() == before
        assert names(tmp_path) == [f".{name}.journal", name]

    def test_a_finished_output_of_other_settings_is_refused_and_said(self, tmp_path, name):
        put(tmp_path / name, ROWS)
        with pytest.raises(ResumeError, match="dtype: expected None, as in the run that is resumed, got 'bfloat16'"):
            begun(tmp_path / name, {"dtype": "bfloat16"}, resume=True)
        with begun(tmp_path / name, {"dtype": "bfloat16"}, resume=True, overwrite=True) as output:
            assert not output.finished
            write_in_chunks(output, ROWS[:2])
            output.publish(ROWS[1], scores_of())
        assert len(content(tmp_path / name)) == 2

    def test_an_output_that_somebody_changed_is_refused(self, tmp_path, name):
        put(tmp_path / name, ROWS)
        with (tmp_path / name).open("ab") as file:
            file.write(b" ")
        told = "expected no such file, or that of the same run; replace it with --overwrite"
        with pytest.raises(OutputError, match=told):
            begun(tmp_path / name, resume=True)

    def test_an_output_without_a_journal_is_refused(self, tmp_path, name):
        put(tmp_path / name, ROWS)
        journal_of(tmp_path / name).unlink()
        with pytest.raises(OutputError, match="replace it with --overwrite"):
            begun(tmp_path / name, resume=True)

    def test_a_journal_without_an_output_is_nothing(self, tmp_path, name):
        put(tmp_path / name, ROWS)
        (tmp_path / name).unlink()
        put(tmp_path / name, ROWS[:1])
        (tmp_path / name).unlink()
        put(tmp_path / name, ROWS[:2], resume=True)
        assert len(content(tmp_path / name)) == 2

    def test_a_part_is_not_lost_unasked(self, tmp_path, name):
        stop_after(tmp_path / name, ROWS[:3])
        part = (tmp_path / f"{name}.partial").read_bytes()
        told = "stopped before it was finished; continue it with --resume, or start anew with --overwrite"
        with pytest.raises(OutputError, match=told):
            open_output(str(tmp_path / name))
        assert (tmp_path / f"{name}.partial").read_bytes() == part
        put(tmp_path / name, ROWS[:1], overwrite=True)
        assert len(content(tmp_path / name)) == 1

    def test_a_part_without_a_journal_is_not_continued(self, tmp_path, name):
        stop_after(tmp_path / name, ROWS[:3])
        journal_of(tmp_path / name).unlink()
        with pytest.raises(ResumeError, match=r"expected \.out.*\.journal, which says what is in it"):
            begun(tmp_path / name, resume=True)

    def test_a_part_is_continued(self, tmp_path, name):
        put(tmp_path / f"whole_{name}", ROWS, 2)
        stop_after(tmp_path / name, ROWS[:4], 2)
        with (tmp_path / f"{name}.partial").open("ab") as partial:
            partial.write(b"what a killed process wrote after its last note")
        with begun(tmp_path / name, resume=True) as output:
            assert output.journal.records == 4
            assert list(output.journal.pass_over(iter(ROWS))) == ROWS[:4]
            output.write(ROWS[4:], scores_of(3, 4, seed=4), ROWS[5])
            output.publish(ROWS[5], scores_of())
        assert [record["n"] for record in content(tmp_path / name)] == [0, 1, 2, 3, 4, 5]

    def test_a_replaced_output_stays_while_a_part_is_continued(self, tmp_path, name):
        put(tmp_path / name, ROWS[:1])
        stop_after(tmp_path / name, ROWS[:3], overwrite=True)
        assert len(content(tmp_path / name)) == 1
        with pytest.raises(OutputError, match="replace it with --overwrite"):
            begun(tmp_path / name, resume=True)
        put(tmp_path / name, ROWS[3:], resume=True, overwrite=True)
        assert [record["n"] for record in content(tmp_path / name)] == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("at", [0, -1])
    def test_a_part_that_somebody_changed_is_refused(self, tmp_path, name, at):
        stop_after(tmp_path / name, ROWS[:3])
        partial = tmp_path / f"{name}.partial"
        changed = bytearray(partial.read_bytes())
        changed[at] ^= 1
        partial.write_bytes(changed)
        with pytest.raises(ResumeError, match=r"expected the [\d,]+ bytes that the earlier run wrote, got others"):
            begun(tmp_path / name, resume=True)
        partial.write_bytes(changed[:-5])
        with pytest.raises(ResumeError, match=r"expected the [\d,]+ bytes that the earlier run wrote, got others"):
            begun(tmp_path / name, resume=True)

    def test_a_part_of_another_run_under_the_same_journal_is_refused(self, tmp_path, name):
        stop_after(tmp_path / name, ROWS[:3])
        stop_after(tmp_path / f"other_{name}", read(f"{GOOD}\n" * 9))
        (tmp_path / f"other_{name}.partial").replace(tmp_path / f"{name}.partial")
        with pytest.raises(ResumeError, match="got others"):
            begun(tmp_path / name, resume=True)

    def test_other_settings_are_refused(self, tmp_path, name):
        with suppress(Stopped), begun(tmp_path / name, {"model file a": "12", "token_budget": 5}) as output:
            write_in_chunks(output, ROWS[:2])
            raise Stopped
        for settings, message in (
            ({"model file a": "13", "token_budget": 5}, "model file a: expected '12', as in the run .* got '13'"),
            ({"model file a": "12", "token_budget": 6}, "token_budget: expected 5, as in the run .* got 6"),
            ({"model file a": "12", "token_budget": 5, "new": 1}, "new: expected None, as in the run .* got 1"),
        ):
            with pytest.raises(ResumeError, match=message):
                begun(tmp_path / name, settings, resume=True)


BROKEN_JOURNALS = [
    ({"records": 0.5}, "records: expected int, got float"),
    ({"records": 0}, "written: expected 0 for no records, got [0-9]+"),
    ({"records": -1}, "records: expected 0 or more, got -1"),
    ({"records": "2"}, "records: expected int, got str"),
    ({"records": True}, "records: expected int, got bool"),
    ({"written": -5}, "written: expected 0 or more, got -5"),
    ({"written": None}, "written: expected int, got NoneType"),
    ({"settings": [1]}, "settings: expected dict, got list"),
    ({"settings": None}, "settings: expected dict, got NoneType"),
    ({"input": 5}, "input: expected str, got int"),
    ({"part": {}}, "part: expected str, got dict"),
    ({"run": 5}, "run: expected an object with host, process, since"),
    ({"run": {"process": "x", "host": "h", "since": "s"}}, "process: expected int, got str"),
    ({"published": 5}, "published: expected an object with digest, size"),
    ({"published": {"size": "x", "digest": ""}}, "size: expected int, got str"),
    ({"more": 5}, "journal: expected an object with"),
]


class TestJournal:
    @pytest.mark.parametrize(("change", "message"), BROKEN_JOURNALS, ids=str)
    def test_a_malformed_journal_is_named(self, tmp_path, change, message):
        path = tmp_path / "out.jsonl"
        stop_after(path, ROWS[:3])
        journal = journal_of(path)
        journal.write_text(json.dumps(json.loads(journal.read_text()) | change))
        with pytest.raises(
            ResumeError, match=rf"\.out\.jsonl\.journal: this file should say how far .* cannot be read: {message}"
        ):
            begun(path, resume=True)
        assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 3

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"records": 1'])
    def test_what_is_no_journal_is_named(self, tmp_path, text):
        stop_after(tmp_path / "out.jsonl", ROWS[:3])
        journal_of(tmp_path / "out.jsonl").write_bytes(text)
        with pytest.raises(ResumeError, match="this file should say how far an earlier run came, but cannot be read: "):
            begun(tmp_path / "out.jsonl", resume=True)

    @pytest.mark.parametrize("records", [1, 2, 4])
    def test_a_journal_with_another_number_of_records_is_refused(self, tmp_path, records):
        path = tmp_path / "out.jsonl"
        stop_after(path, ROWS[:3])
        journal = journal_of(path)
        journal.write_text(json.dumps(json.loads(journal.read_text()) | {"records": records}))
        with (
            begun(path, resume=True) as output,
            pytest.raises(ResumeError, match="that the earlier run finished, got others"),
        ):
            list(output.journal.pass_over(iter(ROWS)))


class TestLock:
    @both_formats
    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    def test_the_second_run_is_told_who_writes(self, tmp_path, name, options):
        with begun(tmp_path / name) as output:
            write_in_chunks(output, ROWS)
            who = rf"another run is writing this output: process {os.getpid()} on {socket.gethostname()}, since 20"
            with pytest.raises(OutputBusyError, match=who):
                open_output(str(tmp_path / name), **options)
            output.publish(ROWS[-1], scores_of())
        assert len(content(tmp_path / name)) == 6

    def test_it_is_told_before_the_first_has_begun(self, tmp_path):
        with open_output(str(tmp_path / "out.jsonl")), pytest.raises(OutputBusyError, match=f"process {os.getpid()}"):
            open_output(str(tmp_path / "out.jsonl"))
        assert names(tmp_path) == []

    def test_the_lock_ends_with_the_process(self, tmp_path):
        path = tmp_path / "out.jsonl"
        code = (
            f"import os; from vhead.scoring.files.opening import open_output; open_output({str(path)!r}); os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        put(path, ROWS)

    def test_a_part_that_was_published_between_opening_and_locking_is_not_taken(self, tmp_path, monkeypatch):
        path = tmp_path / "out.jsonl"
        lock, first = fcntl.flock, [True]

        def late(file, how):
            if first.pop() if first else False:
                (tmp_path / "out.jsonl.partial").rename(path)
            lock(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(OutputError, match="expected no such file yet"):
            open_output(str(path))
        assert names(tmp_path) == ["out.jsonl"]

    def test_a_folder_without_locks_is_said(self, tmp_path, monkeypatch, caplog):
        def unsupported(file, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        put(tmp_path / "out.jsonl", ROWS)
        assert "files cannot be locked here" in caplog.text


class TestOtherThings:
    def make(self, path, kind):
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path.parent / "victim")
        else:
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(path))
            server.close()

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    @pytest.mark.parametrize("kind", ["folder", "pipe", "link", "socket"])
    @pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
    def test_what_is_no_file_is_refused_at_once_and_never_followed(self, tmp_path, kind, name, options):
        (tmp_path / "victim").write_text("keep")
        self.make(tmp_path / name, kind)
        before = (tmp_path / name).lstat()
        with pytest.raises(OutputError, match=rf"{name}: expected .*found a (device or a )?{kind}"):
            open_output(str(tmp_path / "out.jsonl"), **options)
        assert (tmp_path / name).lstat() == before
        assert (tmp_path / "victim").read_text() == "keep"
        assert names(tmp_path) == sorted([name, "victim"])

    def test_a_second_name_of_somebody_s_file_is_refused(self, tmp_path):
        (tmp_path / "victim").write_text("keep")
        os.link(tmp_path / "victim", tmp_path / "out.jsonl.partial")
        with pytest.raises(OutputError, match="expected a file with one name"):
            open_output(str(tmp_path / "out.jsonl"), overwrite=True)
        assert (tmp_path / "victim").read_text() == "keep"

    @pytest.mark.parametrize("planted", [".out.parquet.unfinished", ".out.parquet.journal.new"])
    def test_planted_links_are_replaced_and_never_followed(self, tmp_path, planted):
        (tmp_path / "victim").write_text("keep")
        (tmp_path / planted).symlink_to(tmp_path / "victim")
        put(tmp_path / "out.parquet", ROWS)
        assert (tmp_path / "victim").read_text() == "keep"
        assert len(content(tmp_path / "out.parquet")) == 6

    def test_a_link_as_journal_is_refused(self, tmp_path):
        stop_after(tmp_path / "out.jsonl", ROWS[:2])
        journal = journal_of(tmp_path / "out.jsonl")
        journal.rename(tmp_path / "elsewhere")
        journal.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match="found a link"):
            begun(tmp_path / "out.jsonl", resume=True)

    def test_a_new_output_has_the_usual_permissions(self, tmp_path):
        put(tmp_path / "out.jsonl", ROWS)
        (tmp_path / "usual").touch()
        assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == stat.S_IMODE(
            (tmp_path / "usual").stat().st_mode
        )
