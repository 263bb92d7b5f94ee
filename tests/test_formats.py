"""csv and json files: what is kept as it is, and what names its line."""

import gzip
import json
from pathlib import Path

import pytest

from flax_lstm.config import UserError
from flax_lstm.formats import decode, parse_csv, parse_json

FILE = Path("FILE")


def test_csv_text_stays_text():
    texts = ["NA", "null", "", "12", "nan", 'a "quoted", text', "two\nlines", "a\x00b"]
    content = "text,label\n" + "".join(
        '"' + text.replace('"', '""') + f'",{i % 2}\n' for i, text in enumerate(texts)
    )
    columns, lines, unit = parse_csv(content.encode(), FILE, tabs=False)
    assert columns == {"text": texts, "label": list("01010101")}
    assert (lines, unit) == ([2, 3, 4, 5, 6, 7, 9, 10], "line")


def test_tabs_crlf_blank_lines_and_a_field_of_a_megabyte():
    long = "x" * 1_000_000
    content = f"text\tlabel\r\na, b\t1\r\n\r\n{long}\t0\r\n"
    columns, lines, _ = parse_csv(content.encode(), FILE, tabs=True)
    assert columns == {"text": ["a, b", long], "label": ["1", "0"]}
    assert lines == [2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\nb, c,0\n", "line 3 of FILE has 3 fields and the header 2"),
        ("text,label\na,1\nb\n", "line 3 of FILE has 1 fields and the header 2"),
        (
            'text,label\nc,0\n"a,1\nb,0\nb,0\n',
            "begins in line 3 of FILE does not parse, up to line 5",
        ),
        (
            'text,label\nc,0\n"a,1\nb,0\n"b",0\n',
            "begins in line 3 of FILE does not parse, up to line 5",
        ),
        ("text,text\na,1\n", "more than one column 'text'"),
        ("\ntext,label\na,1\n", "line 1 of FILE names no column; expected a header"),
        (",\na,1\n", "line 1 of FILE names no column; expected a header"),
    ],
)
def test_broken_csv_names_the_line(content, message):
    message = message.replace("header 2", "header has 2")
    with pytest.raises(UserError, match=message):
        parse_csv(content.encode(), FILE, tabs=False)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["n", "rn", "r"])
def test_rows_of_a_tsv_between_two_stray_quotes_are_not_one_text(end):
    """The reader of csv takes them for one, and 2 of 4 rows would be gone."""
    rows = ["text\tlabel", "fine\t1", '"so good\t1', "bad\t0", 'I left"\t0', ""]
    with pytest.raises(UserError) as refused:
        parse_csv(end.join(rows).encode(), FILE, tabs=True)
    said = str(refused.value)
    assert said.startswith("the row in lines 3 to 5 of FILE has a text within quotes")
    assert "its quotes doubled, or be given as jsonl" in said


def test_a_quoted_text_of_a_tsv_has_tabs_or_lines():
    """Either is how a csv is quoted; a csv may have both."""
    rows = 'text\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n"""so"" he said"\t1\n'
    columns, lines, _ = parse_csv(rows.encode(), FILE, tabs=True)
    texts = ["two\nlines", "a\ttab", '"so" he said']
    assert columns == {"text": texts, "label": ["1", "0", "1"]}
    assert lines == [3, 4, 5]
    both = 'text,label\n"a\ttab\nin two lines",1\n'
    columns, _, _ = parse_csv(both.encode(), FILE, tabs=False)
    assert columns["text"] == ["a\ttab\nin two lines"]


def test_json_as_an_array_or_as_lines():
    records = [{"text": "a", "label": 1}, {"text": "b\u2028c", "label": 0}]
    want = {"text": ["a", "b\u2028c"], "label": [1, 0]}
    array = json.dumps(records, indent=1)
    assert parse_json(array, FILE) == (want, [1, 2], "row")
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    assert parse_json(lines + "\n", FILE) == (want, [1, 3], "line")


def test_a_missing_key_is_nothing():
    columns, _, _ = parse_json('{"text": "a"}\n{"label": 1}', FILE)
    assert columns == {"text": ["a", None], "label": [None, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 of FILE is not JSON"),
        ('[\n{"text": "a"},\n{"text" 1}]', "line 3 of FILE is not JSON"),
        ('{\n "text": "a"\n}', "line 1 of .* is not JSON.* one whole object per line"),
        ('"just a text"', "line 1 of FILE is 'just a text'; expected an object"),
        ("[1, 2]", "row 1 of FILE is 1; expected an object"),
        ("[]", "no rows in FILE[.]$"),
        ('{"a": 1}\n{"a": 1, "a": 2}', "line 2 .* the key 'a' more than once"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000, "line 2 of FILE cannot be used"),
        ('{"a": 1}\n{"a": ' + "1" * 5000 + "}", "line 2 of FILE cannot be used"),
        ('{"a": 1}\n{"a": "\\ud800"}', "line 2 of FILE has half a surrogate"),
        ('[{"a": 1}, {"\\uDFFF": ""}]', "row 2 of FILE has half a surrogate"),
        (
            "\n".join(f'{{"k{n}": 0}}' for n in range(2000)),
            "more than 1000 different keys, the last of them 'k1000' in line 1001",
        ),
    ],
)
def test_broken_json_names_the_line(content, message):
    with pytest.raises(UserError, match=message):
        parse_json(content, FILE)


def test_a_whole_surrogate_pair_is_a_character():
    columns, _, _ = parse_json('{"text": "\\ud83d\\ude00"}', FILE)
    assert columns == {"text": ["\U0001f600"]}


def test_text_that_is_not_utf8_names_the_byte():
    assert decode(b"\xef\xbb\xbftext", FILE) == "text"
    message = "FILE is not UTF-8: byte 5, in line 2, is 0xe9"
    with pytest.raises(UserError, match=message):
        decode("a\ncaf\xe9".encode("latin-1"), FILE)


@pytest.mark.parametrize(
    ("content", "form"),
    [
        ("text".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"text,label"), "compressed by gzip"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1", "a Parquet file"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(content, form):
    with pytest.raises(UserError, match=f"FILE is {form}"):
        decode(content, FILE)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_known_by_a_zero_byte(encoding):
    with pytest.raises(UserError, match="begins with a NUL byte as UTF-16 does"):
        decode("text".encode(encoding), FILE)
