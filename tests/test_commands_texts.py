"""What may stand on the standard input, in a file and in an argument."""

import io
import json
import threading

import pytest
from command_lines import error_of, program

from flax_lstm import cli
from flax_lstm.commands import texts
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
    assert list(texts.chunks(["a", "b", None, None, "c"])) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("command", ["predict", "trace"])
def test_what_was_sent_is_answered_before_more_comes(demo_folder, command):
    """A person who types waits for each answer, and so may a program."""
    with program(command, str(demo_folder), stderr=None) as process:
        late = threading.Timer(120, process.kill)  # then there is no next line
        late.start()
        for word in (b"lovely", b"awful"):
            process.stdin.write(word + b" film\n")
            process.stdin.flush()
            answer = next(line for line in process.stdout if word in line)
            assert b"film" in answer
        process.stdin.write(b"no line end")
        out, _ = process.communicate()
        late.cancel()
        assert (b"end" in out, process.returncode) == (True, 0)


def test_lines_do_not_depend_on_where_blocks_of_reading_end(monkeypatch):
    content = b"one\r\n\ntwo words\nx\n" + b"y" * 20
    want = ["one", "", "two words", "x", "y" * 20]
    for size in range(1, 12):
        monkeypatch.setattr(texts, "BLOCK_BYTES", size)
        got = list(texts.lines(io.BufferedReader(io.BytesIO(content)), "x"))
        assert [text for text in got if text is not None] == want
        assert None not in got[:-2]  # a file has no end of what is at hand but its own
