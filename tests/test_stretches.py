"""Stretches of files: every row in one of them, whatever is quoted, in its place."""

import csv
import hashlib
import io
import random
import re

import pytest
from processes import processes

from flax_lstm.config import DataConfig, UserError
from flax_lstm.formats import parse_csv
from flax_lstm.shared_files import read_stretch
from flax_lstm.sharing import share_of_this_process
from flax_lstm.sources import read
from flax_lstm.stretches import line_stretch

PIECES = ["a", "é", " ", ",", '"', "\n", "\r\n", "\r"]
"""What csv texts are made of here: most of it has to be quoted."""


@pytest.mark.parametrize("count", [2, 3, 7])
def test_quoted_lines_fall_to_the_process_in_whose_stretch_they_begin(
    tmp_path, monkeypatch, count
):
    """Random files, so that stretches begin within quotes, rows and pairs of quotes."""
    rng, path = random.Random(count), tmp_path / "file.csv"
    group = processes(monkeypatch, count)
    for _ in range(40):
        rows = [
            ["".join(rng.choices(PIECES, k=rng.randrange(12))), 1]
            for _ in range(rng.randrange(1, 30))
        ]
        file = io.StringIO(newline="")
        ends = {"\n": csv.QUOTE_NONNUMERIC, "\r\n": csv.QUOTE_MINIMAL}
        end = rng.choice(list(ends))
        writer = csv.writer(file, lineterminator=end, quoting=ends[end])
        writer.writerows([["text", "label"], *rows])
        path.write_bytes(file.getvalue().encode())
        columns, lines, _ = parse_csv(path.read_bytes(), path, False)
        results = group.run(lambda _: read_stretch(path, share_of_this_process()))
        for name, column in columns.items():
            assert [v for found, *_ in results for v in found[name]] == column
        where = [name for _, names, _ in results for name in names]
        assert where == [f"line {line} of {path}" for line in lines]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert {found for *_, found in results} == {digest}


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('"left open,1\n', "the row that begins in line {} of .* does not parse"),
        ('"a"b,1\n', "the row that begins in line {} of .* does not parse"),
        ("one field\n", "line {} of .* has 1 fields and the header has 2"),
        ("\udcff,1\n", "is not UTF-8: byte .*, in line {}, is 0xff"),
    ],
    ids=["open quote", "text behind a quote", "fields", "no UTF-8"],
)
def test_a_row_that_does_not_parse_is_named_once(
    tmp_path, monkeypatch, row, words, place
):
    """By the process that reads it; the others repeat it, and say nothing of their own.

    Behind an open quote nothing is what it was, so it is for one process to tell.
    """
    lines = [
        "text,label\n",
        *['"of\nfive, all\nof, them\nin, one\nquote, so",0\n'] * 30,
    ]
    number = int(place * len(lines))
    lines.insert(number, row)
    path = tmp_path / "file.csv"
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    found = processes(monkeypatch, 3).run(
        lambda _: read_stretch(path, share_of_this_process())
    )
    assert all(isinstance(one, UserError) for one in found)
    said = [str(one) for one in found if not str(one).startswith("process ")]
    assert len(said) == 1, found
    # A header of one line, and five lines for each row before.
    assert re.search(words.format(5 * number - 3), said[0]), said


@pytest.mark.parametrize("rows", [1, 10, 60], ids=["within", "over two", "over all"])
def test_rows_between_two_stray_quotes_are_refused_as_by_one_process(
    tmp_path, monkeypatch, rows
):
    """Wherever stretches begin among them; see `formats.parse_csv`."""
    lines = [f"film {n}\t{n % 2}\n" for n in range(90)]
    lines[20] = '"' + lines[20]
    lines[20 + rows] = f'film"\t{rows % 2}\n'
    path = tmp_path / "file.tsv"
    path.write_text("".join(["text\tlabel\n", *lines]))
    found = processes(monkeypatch, 4).run(
        lambda _: read_stretch(path, share_of_this_process())
    )
    assert all(isinstance(one, UserError) for one in found)
    said = [str(one) for one in found if not str(one).startswith("process ")]
    assert len(said) == 1, found
    with pytest.raises(UserError) as alone:
        parse_csv(path.read_bytes(), path, True)
    assert said == [str(alone.value)]
    assert said[0].startswith(f"the row in lines 22 to {22 + rows} of {path} has")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows in .*file.csv: the file is empty"),
        ("\n" * 40, "no rows in .*file.csv: the file is empty"),
        ("\n" * 40 + "text,label\na,1\n", "line 1 of .*file.csv names no column"),
    ],
    ids=["empty", "blank", "header below"],
)
def test_a_file_without_header_is_refused(tmp_path, monkeypatch, content, words):
    """In the same words by any number of processes."""
    path = tmp_path / "file.csv"
    path.write_text(content)
    for count in (1, 3):
        monkeypatch.undo()
        found = processes(monkeypatch, count).run(
            lambda _: read(str(path), DataConfig(), share_of_this_process())
        )
        assert all(isinstance(one, UserError) for one in found)
        assert all(re.search(words, str(one)) for one in found), found


def test_lines_are_cut_where_they_end(tmp_path, monkeypatch):
    path = tmp_path / "file.jsonl"
    path.write_text("a" * 50 + "\n" + "b" * 3 + "\n" + "c" * 7)
    found = processes(monkeypatch, 4).run(
        lambda _: line_stretch(path, share_of_this_process())
    )
    assert found == [(0, 51), (51, 51), (51, 51), (51, 62)]
    path.write_text("aaa\n" * 4)
    found = processes(monkeypatch, 4).run(
        lambda _: line_stretch(path, share_of_this_process())
    )
    assert found == [(0, 4), (4, 8), (8, 12), (12, 16)]
