"""Every kind of source gives the same rows; every kind of fault says what to do."""

import csv
import json
import logging
import os
import socket

import datasets
import pytest

from flax_lstm import data, demo_corpus
from flax_lstm.config import DataConfig, UserError
from flax_lstm.sources import read

TEXTS = ["good film", "NA", "", "bad, film", "a\x00b", "two\nlines"]
LABELS = [1, 0, 1, 0, 1, 0]
CONFIG = DataConfig()


def write(path, texts=TEXTS, labels=LABELS, names=("text", "label")):
    """Writes a file of the type of its suffix with the usual libraries."""
    columns = dict(zip(names, (texts, labels), strict=True))
    records = [
        dict(zip(names, row, strict=True)) for row in zip(texts, labels, strict=True)
    ]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, names, delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.usefixtures("no_network")
def test_a_file_of_any_type_gives_its_rows(suffix, tmp_path):
    source = read(write(tmp_path / f"file{suffix}"), CONFIG)
    rows = source.parts["train"]
    assert list(rows.texts) == TEXTS
    assert [int(label) for label in rows.labels] == LABELS
    assert rows.groups is None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_changed_in_place_is_read_anew(suffix, tmp_path):
    """Same size and same time of change: nothing but the content tells."""
    path = tmp_path / f"file{suffix}"
    first = read(write(path, ["aaa", "bbb"], [0, 1]), CONFIG)
    status = path.stat()
    second_name = write(path, ["ccc", "ddd"], [0, 1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    second = read(second_name, CONFIG)
    assert list(second.parts["train"].texts) == ["ccc", "ddd"]
    assert first.sha256 != second.sha256


def test_columns_are_found_by_usual_names_or_named(tmp_path):
    path = write(tmp_path / "a.csv", names=("Review", "Sentiment"))
    assert list(read(path, CONFIG).parts["train"].texts) == TEXTS
    path = write(tmp_path / "b.csv", names=("x", "y"))
    named = DataConfig(text_column="x", label_column="y", group_column="y")
    rows = read(path, named).parts["train"]
    assert list(rows.texts) == TEXTS
    assert list(rows.groups or ()) == [str(label) for label in LABELS]


@pytest.mark.parametrize(
    ("header", "config", "message"),
    [
        ("x,label", CONFIG, "no column for the text.*columns are 'x', 'label'"),
        ("text,x", CONFIG, "no column for the label.*--label-column"),
        ("text,review", CONFIG, "several columns that could be the text: 'text', 're"),
        ("text,label", DataConfig(text_column="t"), "no column 't'; columns are 'text"),
        ("text,label", DataConfig(label_column="text"), "text and label are both"),
        ("text,label", DataConfig(group_column="g"), "no column 'g'.*--group-column"),
    ],
)
def test_missing_or_ambiguous_columns_are_named(header, config, message, tmp_path):
    path = tmp_path / "file.csv"
    path.write_text(f"{header}\na,1\nb,0\n")
    with pytest.raises(UserError, match=message):
        read(str(path), config)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_an_empty_file_has_no_rows(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no rows in|not read as Parquet"):
        read(str(path), CONFIG)


def test_a_header_alone_has_no_rows(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("text,label\n")
    with pytest.raises(UserError, match=r"no rows in .*file\.csv\.$"):
        read(str(path), CONFIG)


def test_an_unknown_type_or_a_missing_file_is_told(tmp_path):
    path = tmp_path / "file.xlsx"
    path.write_text("text")
    with pytest.raises(UserError, match=r"type '.xlsx'; expected one of .csv"):
        read(str(path), CONFIG)
    for name in (str(tmp_path / "absent.csv"), "absent.csv", "a/b/c"):
        with pytest.raises(UserError, match="no file or folder"):
            read(name, CONFIG)
    for name in ("reviews.csv", "other.csv", "notes.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=r"; .* has reviews.csv, \.\.\.; expected"):
        read(str(tmp_path / "review.csv"), CONFIG)
    with pytest.raises(UserError, match=r"; .* has other.csv, reviews.csv; expected"):
        read(str(tmp_path / "zzz.csv"), CONFIG)
    with pytest.raises(UserError, match=r"; there is no folder .*nowhere either"):
        read(str(tmp_path / "nowhere" / "x.csv"), CONFIG)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    ["nosuch/reviews.txt", "reviews.TXT", "reviews.csv.gz", "nosuch/aclImdb.zip"],
)
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    hub(monkeypatch, AssertionError("the Hub was asked"))
    with pytest.raises(UserError, match=f"no file or folder {name}"):
        read(name, CONFIG)


def test_a_name_of_the_hub_may_have_a_dot(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    hub(monkeypatch, datasets.DatasetDict({"train": rows}))
    for name in ("org/name-v1.5", "org/name.en", "imdb"):
        assert list(read(name, CONFIG).parts["train"].texts) == ["a", "b"]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_where_one_is(name, tmp_path, monkeypatch):
    for label in ("pos", "neg"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0_7.txt").write_text(label)
    monkeypatch.chdir(tmp_path)
    assert len(read(".", CONFIG).parts["train"]) == 2
    with pytest.raises(UserError, match=r"the name of the data is empty; expected `de"):
        read(name, CONFIG)
    with pytest.raises(UserError, match=r"the name of the data is empty"):
        data.load(DataConfig(test_data=name), 0)


def test_a_text_that_is_no_string_names_its_line(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": 5, "label": 0}\n')
    with pytest.raises(UserError, match=r"line 2 of .*file.jsonl has 5 for a text"):
        read(str(path), CONFIG)
    path.write_text('{"text": "a", "label": 1}\n{"label": 0}\n')
    with pytest.raises(UserError, match=r"line 2 of .*has nothing for a text"):
        read(str(path), CONFIG)


def test_latin1_names_file_and_byte(tmp_path):
    path = tmp_path / "file.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"file.csv is not UTF-8: byte 14, in line 2, is 0xe9"
    ):
        read(str(path), CONFIG)


def hub(monkeypatch, result):
    def load_dataset(name, **options):
        assert not options, "nothing but the name: no remote code"
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_hub_dataset_keeps_its_parts_and_names_its_classes(monkeypatch):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )

    def part(texts, labels):
        columns = {"text": texts, "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    parts = {
        "train": part(["a", "b"], [0, 1]),
        "dev": part(["c"], [1]),
        "test": part(["d", "e"], [-1, -1]),
        "unsupervised": part(["f"], [-1]),
    }
    hub(monkeypatch, datasets.DatasetDict(parts))
    source = read("someone/reviews", CONFIG)
    assert set(source.parts) == {"train", "validation"}
    assert list(source.parts["train"].labels) == ["neg", "pos"]
    assert source.notes == ("someone/reviews (test) has no labels and is not used",)


def test_what_is_said_while_the_hub_is_asked_is_not_shown(monkeypatch, caplog):
    """Six times the same, before the message that says it."""
    logger = logging.getLogger("huggingface_hub.utils._http")

    def load_dataset(name):
        logger.warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"Couldn't reach it\. Check the path"):
        read("x/y", CONFIG)
    assert not caplog.records
    logger.warning("afterwards")
    assert len(caplog.records) == 1


def test_what_the_hub_says_becomes_one_message(monkeypatch):
    hub(monkeypatch, ConnectionError("Couldn't reach 'x/y' on the Hub\nand more"))
    with pytest.raises(UserError, match=r"'x/y' is no file or folder here.*Couldn't"):
        read("x/y", CONFIG)
    empty = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    hub(monkeypatch, datasets.DatasetDict({"other": empty}))
    with pytest.raises(UserError, match=r"no labelled training part.*'other'"):
        read("x/y", CONFIG)


@pytest.mark.usefixtures("no_network")
def test_the_demo_is_the_generated_corpus():
    source = read("demo", CONFIG)
    rows = source.parts["train"]
    want = demo_corpus.sentences()
    assert list(rows.texts) == [sentence.text for sentence in want]
    assert [label == "positive" for label in rows.labels] == [s.label for s in want]
    with pytest.raises(UserError, match="no columns"):
        read("demo", DataConfig(group_column="film"))
