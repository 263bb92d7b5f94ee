"""What may stand on the standard input, in a file and in an argument."""

import json

import pytest
from command_lines import error_of

from flax_lstm import cli
from flax_lstm.commands import answers, texts
from flax_lstm.config import Config

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_line_ends_a_byte_order_mark_and_empty_lines(capsys, demo_folder, stdin):
    stdin(b"\xef\xbb\xbfgood\r\n\r\nbad\nno end")
    assert cli.main(["predict", str(demo_folder), "--format", "jsonl"]) == 0
    out = capsys.readouterr().out
    got = [json.loads(line)["text"] for line in out.splitlines()]
    assert got == ["good", "", "bad", "no end"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the standard input is empty"),
        (
            b"good\nna\xefve\n",
            "line 2 of the standard input is not UTF-8 (byte 3: 0xef)",
        ),
        (b"good\0\n", "line 1 of the standard input holds a NUL byte"),
        ("good\n".encode("utf-16"), "NUL byte"),
    ],
    ids=["empty", "latin1", "nul", "utf16"],
)
def test_input_that_is_no_text_is_an_error(capsys, demo_folder, stdin, content, words):
    stdin(content)
    assert words in error_of(capsys, "predict", str(demo_folder))


def test_a_line_of_ten_megabytes_is_cut_to_max_length(capsys, demo_folder, stdin):
    stdin(b"good " * 2_000_000 + b"\n")
    assert cli.main(["predict", str(demo_folder), "--format", "jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["tokens"] == Config().data.max_length


def test_a_missing_file_is_an_error(capsys, demo_folder, tmp_path):
    file = tmp_path / "none.txt"
    said = error_of(capsys, "predict", str(demo_folder), "--file", str(file))
    assert f"cannot read {file}" in said


def test_an_argument_that_is_not_utf8_is_an_error(capsys, demo_folder):
    """Python hands such bytes over as lone surrogates."""
    said = error_of(capsys, "predict", str(demo_folder), "na\udcefve")
    assert "UTF-8" in said


def test_texts_come_in_chunks_of_bounded_number_and_size(monkeypatch):
    monkeypatch.setattr(texts, "CHUNK_CHARACTERS", 10)
    got = list(texts.chunks(iter(["a", "b", "c", "d", "x" * 11, "e", "f"]), 3))
    assert got == [["a", "b", "c"], ["d", "x" * 11], ["e", "f"]]
    assert list(texts.chunks(iter([]))) == []


def test_what_a_person_types_is_answered_line_by_line(capsys, monkeypatch, demo_folder):
    """The second line is typed when the first has been answered."""
    answered = []

    def lines(file, name):
        for line in ("lovely film", "awful film"):
            answered.append(capsys.readouterr().out)
            yield line

    monkeypatch.setattr(texts, "lines", lines)
    monkeypatch.setattr(answers, "typed", lambda given, path: not given and not path)
    for command in ("predict", "trace"):
        answered.clear()
        assert cli.main([command, str(demo_folder)]) == 0
        before, between = answered
        assert (before, "lovely" in between) == ("", True)
        assert "awful" in capsys.readouterr().out
