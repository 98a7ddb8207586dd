"""A record is read as it was written, or refused in one sentence that names the place."""

import copy
import json
import sys

import pytest

from lightning_abpem.report.record import check_writable, read_record, write_text
from tests.report.records import record, written


def test_a_record_comes_back_as_it_was(tmp_path):
    assert read_record(written(tmp_path, record())) == record()
    assert read_record(written(tmp_path, {**record(), "blocks": None})) == {**record(), "blocks": None}


def place(content, path):
    """The container of a value, and its name or index in it."""
    for part in path[:-1]:
        content = content[part]
    return content, path[-1]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("run", "method"), 3, "record.run.method to be words"),
        (("run", "method"), "x" * 5000, "words of at most 4000"),
        (("run", "error"), "\ud800", "record.run.error to be words"),
        (("seconds", "total"), 10**400, "record.seconds.total to be a finite number, but got a number of too many"),
        (("seconds", "total"), -1.0, "record.seconds to be >= 0"),
        (("seconds", "adapting"), True, "record.seconds.adapting to be a finite number, but got True"),
        (("counts", "steps"), -1, "record.counts.steps to be an integer >= 0"),
        (("counts", "steps"), 1.5, "record.counts.steps to be an integer >= 0"),
        (("steps", "samples"), [4], "columns of one length"),
        (("steps", "first"), [0, 1, 2, 3, 5, 4], "in the order of steps"),
        (("steps", "figures", "entropy"), [1.0, "x", None, 0, 0, 0], "record.steps.figures.'entropy'[1]"),
        (("steps", "figures"), {str(i): [] for i in range(501)}, "at most 500 names"),
        (("classes", "counts"), [[1, 2, 3]], "a row for each name"),
        (("resets",), list(range(20_001)), "a list of at most 20000"),
        (("resets",), {"a": 1}, "record.resets to be a list"),
        (("events", 0), {"step": 1}, "record.events[0] to hold step, action, cause"),
        (("blocks", "pairs", 0, "before", 0, 0), [1.0], "of one shape"),
        (("blocks", "pairs", 0, "before", 0), [], "of one shape"),
        (("blocks", "pairs", 0, "before"), [], "the same samples"),
        (("blocks", "pairs", 0, "before", 0, 0), [1.0] * 65, "a list of at most 64"),
        (("metrics", "late"), "word", "record.metrics.'late' to be a finite number"),
        (("more",), 1, "record to hold format"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, path, value, words):
    content = copy.deepcopy(record())
    container, name = place(content, path)
    container[name] = value
    with pytest.raises(ValueError, match="report.json is damaged: expected") as caught:
        read_record(written(tmp_path, content))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "to be a record in JSON"),
        ("{", "to be a record in JSON"),
        ("[]", "to be the record of a run"),
        ("{}", "to be the record of a run"),
        ("[" * 200_000, "nested too deep"),
        ('{"a": NaN}', "NaN, which is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity, which is no number"),
        ('{"a": ' + "9" * 5000 + "}", "to be a record in JSON"),
        ('{"format": "lightning_abpem report", "version": 1}', "to be of version 2, but got 1"),
        ('{"format": "lightning_abpem report", "version": 2}', "is damaged: expected record to hold"),
        (b"\xff\xfe\x00", "to be a record in JSON"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, words):
    path = tmp_path / "report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="Expected|is damaged") as caught:
        read_record(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_number_is_not_finite(tmp_path):
    text = json.dumps(record()).replace("12.5", "1e999")
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match="finite number, but got inf"):
        read_record(tmp_path / "report.json")


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_abpem.report.record._BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 bytes"):
        read_record(written(tmp_path, record()))


def test_a_page_that_cannot_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="there is no '.*none'. Make it first"):
        check_writable(tmp_path / "none" / "report.html")
    with pytest.raises(ValueError, match="is something else"):
        check_writable(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that refuses files, on Linux")
def test_a_folder_that_refuses_is_named():
    from pathlib import Path

    with pytest.raises(ValueError, match="'/proc' refuses"):
        check_writable(Path("/proc/report.html"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new \ud800")
    assert path.read_text() == "new ?"
