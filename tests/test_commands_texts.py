"""What may stand on the standard input, in a file and in an argument."""

import json

import pytest
from command_lines import error_of

from flax_lstm import cli
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
