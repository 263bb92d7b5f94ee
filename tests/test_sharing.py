"""Several processes read what one reads, each a part of it; and say the same of it.

Processes are threads here (processes.py); tests/faults has real ones.
"""

import csv
import importlib
import json
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import processes

from flax_lstm import data, distributed, text
from flax_lstm.config import DataConfig, UserError
from flax_lstm.feeding import Feed
from flax_lstm.sharing import Share, share_of_this_process

ROWS = 97
BATCH = 10
COUNTS = [2, 3, 5]


def make_rows() -> list[dict]:
    """Short and long texts of few words; empty, repeated and many-lined ones."""
    rng = random.Random(1)
    words = [f"w{n}" for n in range(40)] + ["größe", "日本", "😀"]
    rows = []
    for n in range(ROWS):
        said = rng.choices(words, k=rng.choice([1, 3, 8, 30]))
        glue = rng.choice([" ", ", ", "\n", ' "', "\r\n"])
        rows.append({"text": glue.join(said), "label": n % 2, "film": f"f{n // 3}"})
    for n in (4, 50, 96):
        rows[n]["text"] = ""
    for n in (5, 60, 95):
        rows[n]["text"] = "w1 w2 again"
    return rows


def write(folder: Path, form: str) -> Path:
    """Writes the rows as a file of this form, or as a folder."""
    rows, path = make_rows(), folder / f"rows.{form.split()[0]}"
    if form == "folder":
        for n, row in enumerate(rows):
            name = ["neg", "pos"][row["label"]]
            for part in ("train", "test", "dev") if n % 5 else ("train",):
                (path / part / name).mkdir(parents=True, exist_ok=True)
                file = path / part / name / f"{n:03}.txt"
                file.write_text(row["text"], encoding="utf-8")
        return path
    if form.startswith("parquet"):
        size = 1000 if form == "parquet of one group" else 10
        plain = {"compression": "none", "use_dictionary": False}
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=size, **plain)
    elif form in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            tabs = "\t" if form == "tsv" else ","
            writer = csv.DictWriter(file, rows[0], delimiter=tabs)
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def local(process: int, count: int) -> slice:
    """The rows of a batch that a process with one device feeds."""
    share = -(-BATCH // count)
    return slice(process * share, (process + 1) * share)


def batches(feed: Feed) -> list[data.Batch]:
    """Two epochs, one that goes on in its middle, and the parts of the evaluation."""
    asked = [("train", 3, 1, 0), ("train", 3, 2, 0), ("train", 3, 2, 4)]
    asked += [("validation", 0, None, 0), ("test", 0, None, 0)] * 2
    return [
        batch
        for part, seed, epoch, start in asked
        for batch in feed.batches(part, seed=seed, epoch=epoch, start=start)
    ]


FORMS = (
    *("csv", "tsv", "json", "jsonl", "parquet", "parquet of one group", "folder"),
    *("hub", "demo"),
)
SETTINGS = {
    "words": {"max_length": 12, "min_count": 2, "buckets": 3},
    "tutorial": {"max_length": 12, "pipeline": "tutorial"},
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("pipeline", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_batches_vocabulary_and_counts_are_those_of_one(
    tmp_path, monkeypatch, form, pipeline, count
):
    """Bit by bit, at every step, whichever process feeds a row."""
    path = form if form in ("demo", "hub") else str(write(tmp_path, form))
    rows = datasets.Dataset.from_list(make_rows())
    hub = datasets.DatasetDict({"train": rows, "test": rows.select(range(9))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    group = "film" if form not in ("folder", "demo", "tsv") else None
    config = DataConfig(
        data=path,
        batch_size=BATCH,
        group_column=group,
        validation_fraction=0.2,
        test_fraction=0.2,
        **SETTINGS[pipeline],
    )
    whole = data.load(config, 7)

    def one(process: int):
        corpus = data.load(config, 7, share=share_of_this_process())
        mine = local(process, count)
        feed = Feed(corpus, corpus.bucket_lengths, config, mine)
        return corpus, batches(feed)

    results = processes(monkeypatch, count).run(one)
    for corpus, _ in results:
        assert corpus.summary == whole.summary
        assert corpus.label_names == whole.label_names
        assert corpus.bucket_lengths == whole.bucket_lengths
    for process in range(count):
        mine = local(process, count)
        want = batches(Feed(whole, whole.bucket_lengths, config, mine))
        got = results[process][1]
        assert len(got) == len(want) > 10
        for batch, wanted in zip(got, want, strict=True):
            for name, array in wanted._asdict().items():
                np.testing.assert_array_equal(getattr(batch, name), array, name)


@pytest.mark.parametrize("form", FORMS[:-2])
def test_each_row_is_encoded_and_held_by_one_process(tmp_path, monkeypatch, form):
    """A third of the rows by each of three, where one encodes them all."""
    seen: list[list[str]] = [[], [], []]
    encode = text.TextTokenizer.encode_flat

    def counted(self, texts, limit):
        seen[distributed.place()[0]] += texts
        return encode(self, texts, limit)

    config = DataConfig(data=str(write(tmp_path, form)), min_count=1)
    whole = data.load(config, 7)
    monkeypatch.setattr(text.TextTokenizer, "encode_flat", counted)
    corpora = processes(monkeypatch, 3).run(
        lambda _: data.load(config, 7, share=share_of_this_process())
    )
    total = sum(map(len, whole.parts.values()))
    assert sorted(t for of in seen for t in of) == sorted(
        t for of in whole.texts.values() for t in of
    )
    for texts, corpus in zip(seen, corpora, strict=True):
        held = [rows.held for rows in corpus.shared.values()]
        assert sum(map(len, held)) == len(texts)
        # Stretches of bytes do not hold equally many rows of unequal length.
        assert len(texts) == pytest.approx(total / 3, rel=0.35)
    tokens = sum(len(part.tokens) for part in whole.parts.values())
    assert tokens == sum(
        len(rows.held.tokens) for corpus in corpora for rows in corpus.shared.values()
    )


PARSERS = {
    "csv": "shared_files.parse_csv",
    "tsv": "shared_files.parse_csv",
    "jsonl": "shared_files.parse_json",
    "folder": "text_folder.decode",
}


@pytest.mark.parametrize("form", PARSERS)
def test_each_byte_is_parsed_by_one_process(tmp_path, monkeypatch, form):
    """A third by each of three, of what one parses; and the header by each."""
    path, read = write(tmp_path, form), [0, 0, 0]
    module, name = PARSERS[form].split(".")
    parse = getattr(importlib.import_module(f"flax_lstm.{module}"), name)

    def counted(content, *args, **kwargs):
        raw = content.encode() if isinstance(content, str) else content
        read[distributed.place()[0]] += len(raw)
        return parse(content, *args, **kwargs)

    monkeypatch.setattr(f"flax_lstm.{module}.{name}", counted)
    config = DataConfig(data=str(path), min_count=1)
    processes(monkeypatch, 3).run(
        lambda _: data.load(config, 7, share=share_of_this_process())
    )
    files = path.rglob("*.txt") if form == "folder" else [path]
    size = sum(file.stat().st_size for file in files)
    headers = 2 * len("\ufefftext,label,film\r\n".encode()) * (form in ("csv", "tsv"))
    assert sum(read) == size + headers
    # A text is as much as a tenth of a stretch of this file.
    assert read == pytest.approx([sum(read) / 3] * 3, rel=0.35)


def test_a_parquet_file_is_unpacked_by_the_groups_of_each(tmp_path, monkeypatch):
    path, read = write(tmp_path, "parquet"), [[], [], []]
    unpack = pq.ParquetFile.read_row_groups

    def counted(self, groups):
        read[distributed.place()[0]] += groups
        return unpack(self, groups)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    config = DataConfig(data=str(path), min_count=1)
    processes(monkeypatch, 3).run(
        lambda _: data.load(config, 7, share=share_of_this_process())
    )
    assert read == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]  # rows 0, 32, 64, 97


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_bad_row_ends_all_with_its_place(tmp_path, monkeypatch, form, count):
    """The last one, which the last process reads: named as one process names it."""
    path = write(tmp_path, form)
    if form == "parquet":
        rows = [*make_rows(), {"text": None, "label": 1, "film": "f"}]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    else:
        row = {"csv": '\n"x",1.5,f\n', "jsonl": '\n{"text": "x", "label": 1.5}\n'}
        with path.open("a", newline="") as file:
            file.write(row[form])
    config = DataConfig(data=str(path), min_count=1)
    with pytest.raises(UserError) as alone:
        data.load(config, 0)
    assert re.match(rf"(line|row) \d+ of {path} has", str(alone.value))
    *others, last = processes(monkeypatch, count).run(
        lambda _: data.load(config, 0, share=share_of_this_process())
    )
    assert str(last) == str(alone.value)
    for other in others:
        assert isinstance(other, UserError)
        assert str(other) == f"process {count - 1} of {count}: {last}"


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "folder", "jsonl's end"])
def test_another_file_in_one_process_is_found(tmp_path, monkeypatch, form):
    """As on machines that have each a copy: a letter differs, where process 1 reads.

    Or where no process reads: at the end of the line after which process 1 would begin.
    """
    path = write(tmp_path, form.removesuffix("'s end"))
    if form == "folder":
        last = path / "test" / "pos" / "091.txt"
        changed = (last, last.read_bytes() + b".")
    elif form == "jsonl's end":
        raw = path.read_bytes()
        place = raw.index(b"\n", len(raw) // 2)
        changed = (path, raw[:place] + b" " + raw[place + 1 :])
    else:
        raw = path.read_bytes()
        place = raw.rindex(b"w1 w2 again")
        changed = (path, raw[: place + 1] + b"2" + raw[place + 2 :])
    other = tmp_path / "changed"
    other.write_bytes(changed[1])
    opened = Path.open

    def as_there(self, *args, **kwargs):
        theirs = distributed.place()[0] == 1 and self == changed[0]
        return opened(other if theirs else self, *args, **kwargs)

    config = DataConfig(data=str(path), min_count=1)
    group = processes(monkeypatch, 2)
    monkeypatch.setattr(Path, "open", as_there)
    first, second = group.run(
        lambda _: data.load(config, 0, share=share_of_this_process())
    )
    assert "process 1 differs from process 0 in" in str(first)
    assert str(first).endswith("Give all processes the same data.")
    assert str(second) == f"process 0 of 2: {first}"


def test_more_processes_than_rows(tmp_path, monkeypatch):
    """Those without a row have their part in all else."""
    path = tmp_path / "few.csv"
    path.write_text("text,label\n" + "good film,1\nbad film,0\n" * 3)
    config = DataConfig(
        data=str(path), min_count=1, validation_fraction=0.2, test_fraction=0.2
    )
    whole = data.load(config, 0)
    for corpus in processes(monkeypatch, 16).run(
        lambda _: data.load(config, 0, share=share_of_this_process())
    ):
        assert corpus.summary == whole.summary


def test_alone_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(distributed, "gather", None)
    assert Share().gather(3) == [3]
    assert Share().whole
    with pytest.raises(ZeroDivisionError), Share().together():
        raise ZeroDivisionError
