"""Damaged data of every kind, told before a step is trained.

A message names the file and the row. What is fine stays fine: nothing of it is lost,
nothing becomes something else.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from command_lines import error_of
from small_runs import make_config

from flax_lstm import data
from flax_lstm import folder as files
from flax_lstm import parquet as parquet_files
from flax_lstm import run as runs
from flax_lstm.config import DataConfig, UserError
from flax_lstm.run import Run

CSV = "text,label\n" + "good film,1\nbad film,0\n" * 10
JSONL = '{"text":"good film","label":1}\n{"text":"bad film","label":0}\n' * 10
LAST = 22  # the line of a row appended to CSV; 21 in JSONL


def load(path: Path, content: str | bytes | None = None, **settings) -> data.Corpus:
    """Reads a file, written first where there is something to write."""
    if content is not None:
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(raw)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    return data.load(DataConfig(data=str(path), min_count=1, **shares | settings), 0)


def refusal(path: Path, content: str | bytes | None = None, **settings) -> str:
    """Returns why a file is refused; it is named."""
    with pytest.raises(UserError) as refused:
        load(path, content, **settings)
    said = str(refused.value)
    assert path.name in said
    assert "\n" not in said
    return said


def texts(corpus: data.Corpus) -> list[str]:
    return sorted(text for part in corpus.texts.values() for text in part)


def content(corpus: data.Corpus) -> tuple:
    labels = {name: part.labels.tolist() for name, part in corpus.parts.items()}
    return corpus.texts, labels, corpus.label_names


def parquet(*, checksums: bool = False, **columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, write_page_checksum=checksums)
    return file.getvalue()


def test_csv_text_that_looks_like_nothing_stays_text(tmp_path):
    odd = ["NA", "null", "None", "nan", "N/A"]
    rows = "".join(f"{text},{n % 2}\n" for n, text in enumerate(odd * 4))
    assert texts(load(tmp_path / "f.csv", "text,label\n" + rows)) == sorted(odd * 4)


@pytest.mark.parametrize(
    ("pipeline", "settings"), [("words", {}), ("tutorial", {"batch_size": 4})]
)
def test_csv_blank_text(tmp_path, pipeline, settings):
    """Kept as a row of length 0, or dropped; counted either way."""
    rows = CSV + ',1\n"",0\n"   ",1\n'
    corpus = load(tmp_path / "f.csv", rows, pipeline=pipeline, **settings)
    summary = corpus.summary
    kept, empty = sum(summary["rows"].values()), sum(summary["empty_texts"].values())
    want = (23, 3, 0) if pipeline == "words" else (20, 0, 3)
    assert (kept, empty, summary["dropped_empty"]) == want


def test_csv_missing_label(tmp_path):
    said = refusal(tmp_path / "f.csv", CSV + "only text,\n")
    assert said.startswith(f"line {LAST} of ")
    assert "has no label" in said


@pytest.mark.parametrize("row", ["oops,1,2,3\n", "only text\n"])
def test_csv_extra_or_missing_column_in_a_row(tmp_path, row):
    said = refusal(tmp_path / "f.csv", CSV + row)
    assert said.startswith(f"line {LAST} of ")
    assert f"has {row.count(',') + 1} fields and the header has 2" in said


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("zero", f"line {LAST} of FILE has the unknown label 'zero'; other rows have"),
        ("1.5", f"line {LAST} of FILE has the label '1.5'"),
        ("-3", f"found 3: '1' .*'0' .*'-3' .1 rows, first line {LAST} of FILE"),
        ("nan", f"line {LAST} of FILE has the label 'nan'"),
        ("1" * 5000, f"line {LAST} of FILE has the label '1111"),
    ],
    ids=["word", "fraction", "third", "nan", "digits"],
)
def test_csv_label_words_mixed_with_numbers(tmp_path, label, words):
    path = tmp_path / "f.csv"
    path.write_text(CSV + f"x,{label}\n")
    with pytest.raises(UserError, match=words.replace("FILE", str(path))):
        load(path)


def test_csv_labels_in_words(tmp_path):
    rows = "text,label\n" + "good film,positive\nbad film,negative\n" * 10
    corpus = load(tmp_path / "f.csv", rows)
    assert corpus.label_names == ("negative", "positive")


def test_csv_all_numeric_texts_stay_text(tmp_path):
    corpus = load(tmp_path / "f.csv", "text,label\n" + "0123,1\n4e5,0\n" * 10)
    assert texts(corpus) == ["0123"] * 10 + ["4e5"] * 10


@pytest.mark.parametrize(
    ("mark", "shown"), [(";", "';'"), ("\t", r"'\t'"), ("|", "'|'")], ids=ascii
)
def test_csv_separated_by_something_else(tmp_path, mark, shown):
    said = refusal(tmp_path / "f.csv", CSV.replace(",", mark))
    assert f"separated by {shown}? Expected commas" in said
    fine = load(tmp_path / "f.csv", "text,label\n" + "a;b,0\nc;d,1\n" * 10)
    assert texts(fine)[:1] == ["a;b"]


def test_csv_without_header(tmp_path):
    said = refusal(tmp_path / "f.csv", CSV.split("\n", 1)[1])
    assert "no column for the text" in said
    assert "columns are 'good film', '1'" in said


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n"])
def test_csv_header_only_or_empty(tmp_path, content):
    assert "no rows in" in refusal(tmp_path / "f.csv", content)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("latin-1", f"byte {len(CSV) + 3}, in line {LAST}, is 0xe9"),
        ("utf-16", "is UTF-16; convert it"),
        ("utf-16-le", "begins with a NUL byte as UTF-16 does"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_other_encodings(tmp_path, encoding, words, suffix):
    said = refusal(tmp_path / f"f{suffix}", (CSV + "café,1\n").encode(encoding))
    assert re.search(words, said), said


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_byte_order_mark_nul_and_blank_lines_are_fine(tmp_path, suffix):
    rows = CSV if suffix == ".csv" else JSONL
    extra = "go\0od,1\n" if suffix == ".csv" else '{"text":"go\\u0000od","label":1}\n'
    content = b"\xef\xbb\xbf" + (rows + "\n\n" + extra).encode()
    corpus = load(tmp_path / f"f{suffix}", content)
    assert texts(corpus) == sorted(["good film", "bad film"] * 10 + ["go\0od"])


def test_json_array_is_fine(tmp_path):
    rows = [json.loads(line) for line in JSONL.splitlines()]
    want = texts(load(tmp_path / "f.jsonl", JSONL))
    assert texts(load(tmp_path / "f.json", json.dumps(rows))) == want


def test_unclosed_quote(tmp_path):
    said = refusal(tmp_path / "f.csv", CSV + '"open,1\n' + "more,0\n" * 5)
    assert f"row that begins in line {LAST} of" in said
    assert "Is a quote left open?" in said


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "x", ', "is not JSON"),
        ('{"text":5,"label":1}', "has 5 for a text in column 'text'"),
        ('{"text":"x","label":"one"}', "has the unknown label 'one'"),
        ('{"text":"x"}', "has no label"),
        ('{"label":1}', "has nothing for a text"),
        ('{"text":null,"label":1}', "has nothing for a text"),
        ('{"text":"\\ud800","label":1}', "has half a surrogate pair"),
        ('{"text":"a","text":"b","label":1}', "the key 'text' more than once"),
        ('{"text":"a","label":NaN}', "has the label nan"),
        ('{"text":"a","label":[1]}', "has the label [1]"),
        ("[" * 100_000, "cannot be used"),
    ],
    ids=[
        "broken line",
        "text of another type",
        "label of another type",
        "missing label",
        "missing text",
        "null",
        "lone surrogate",
        "key twice",
        "nan",
        "list",
        "nesting",
    ],
)
def test_jsonl_row_that_cannot_be_used(tmp_path, row, words):
    said = refusal(tmp_path / "f.jsonl", JSONL + row + "\n")
    assert "line 21 of " in said
    assert words in said


@pytest.mark.parametrize("content", ["", "\n", "[]"])
def test_jsonl_empty_file(tmp_path, content):
    assert "no rows in" in refusal(tmp_path / "f.jsonl", content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (parquet(text=["a", "b"] * 10, label=[1, 0] * 10)[:200], "not read as Parquet"),
        (b"hello", "not read as Parquet"),
        (b"", "not read as Parquet"),
        (parquet(text=[], label=[]), "no rows in"),
        (parquet(text=["a", None], label=[1, 0]), "row 2 of"),
        (parquet(text=["a", "b"], label=[1, None]), "row 2 of"),
        (parquet(text=[b"a", b"b"], label=[1, 0]), "row 1 of"),
    ],
    ids=["cut", "other", "empty", "no rows", "no text", "no label", "bytes"],
)
def test_parquet_that_cannot_be_used(tmp_path, content, words):
    assert words in refusal(tmp_path / "f.parquet", content)


def test_parquet_text_that_is_no_utf8(tmp_path):
    ends = np.arange(3, dtype=np.int32).tobytes()
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(ends), pa.py_buffer(b"a\xff")]
    )
    said = refusal(tmp_path / "f.parquet", parquet(text=bad, label=[0, 1]))
    assert "column 'text' is damaged" in said


@pytest.mark.parametrize("checksums", [False, True], ids=["without", "with"])
def test_parquet_bit_flip(tmp_path, checksums):
    """41 bits over the whole file: refused by name, or a corpus of the same form.

    With checksums it is the same corpus. Without them, which Parquet lets its writers
    leave out, a bit of a letter is another letter, as it was in 28 of 400 such files:
    the hash in the run's record then differs, and is what tells.
    """
    random = np.random.default_rng(0)
    words = [f"word{n} {'good' if n % 2 else 'bad'}" for n in range(40)]
    columns = {"text": words, "label": [n % 2 for n in range(40)]}
    whole = parquet(checksums=checksums, **columns)
    path, sound = tmp_path / "f.parquet", load(tmp_path / "s.parquet", whole)
    refused = read = 0
    for place in random.choice(len(whole) * 8, 41, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        try:
            corpus = load(path, bytes(damaged))
        except UserError as error:  # anything else fails the test
            refused += path.name in str(error) or "classes" in str(error)
            continue
        assert corpus.summary["source"]["sha256"] != sound.summary["source"]["sha256"]
        assert sum(corpus.summary["rows"].values()) == 40
        if checksums:
            assert content(corpus) == content(sound), f"silent: bit {place}"
        read += 1
    assert refused + read == 41
    assert refused > 5


def test_line_of_10_mb_is_cut_before_it_is_padded(tmp_path, source):
    """Two million words; a batch of 64 such rows would take half a GB of ids."""
    content = source.read_text() + '"' + "lovely film " * 1_000_000 + '",good\n'
    corpus = load(tmp_path / "f.csv", content)
    assert sum(corpus.summary["truncated"].values()) == 1
    assert max(corpus.summary["longest"].values()) == DataConfig().max_length
    widths = [
        batch.tokens.shape[1]
        for part in corpus.parts.values()
        for batch in data.batches(
            part, corpus.bucket_lengths, DataConfig(), seed=0, epoch=None
        )
    ]
    assert max(widths) == DataConfig().max_length == 400


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_file_changed_in_place_with_its_size_and_time(
    tmp_path, source, compilation_cache, suffix
):
    """Resuming and evaluating both find out; the record has the hash of the bytes.

    One bit of one letter, which nothing in the file contradicts.
    """
    path = Path(shutil.copy(source, tmp_path / f"f{suffix}"))
    if suffix == ".parquet":
        table = pa.csv.read_csv(source)
        plain = dict(compression="none", use_dictionary=False, write_statistics=False)
        pq.write_table(table, path, **plain)
    config = make_config(path)  # as of `trained`, whose programs are kept
    folder = tmp_path / "run"
    runs.train(config, folder)
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"lovely", b"lovelx", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "lovelx" in " ".join(texts(load(path)))  # read without a word
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(
        UserError, match=r"the data has changed .*: source was .*sha256"
    ):
        runs.train(config, folder, resume=True)
    with pytest.raises(UserError, match=r"the data has changed"):
        Run.load(folder).evaluate()
    path.write_bytes(content)
    assert Run.load(folder).evaluate()["count"] == 8


def test_archives_bombs_and_slips_are_not_unpacked(tmp_path):
    """50 MB in 138 kB, and an entry that would climb out of the folder."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    archive = folder / "f.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.csv", "text,label\n" + ("a" * 1000 + ",1\n") * 1000)
        file.writestr("../../slip_escaped.csv", CSV)
    assert "has the type '.zip'; expected one of" in refusal(archive)
    shutil.copy(archive, folder / "f.csv")
    assert "is a zip archive; unpack it first" in refusal(folder / "f.csv")
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["f.csv", "f.zip"]


def test_parquet_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "machine_bytes", lambda: 10**6)
    content = parquet(text=["x"] * 10_000, label=[1] * 10_000)
    assert len(content) < 1500
    assert "GiB of memory" in refusal(tmp_path / "f.parquet", content)


def test_pickle_is_refused(tmp_path):
    for name in ("f.pkl", "f.pickle", "f.npy"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
        assert "has the type" in refusal(tmp_path / name)


def test_script_dataset_does_not_run(tmp_path, monkeypatch):
    """A folder with a script in it, and a Hub name whose data set is a script."""
    import datasets

    script = tmp_path / "script" / "script.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    assert "no folder" in refusal(script.parent)
    assert "has the type '.py'" in refusal(script)
    given = []

    def load_dataset(*arguments, **options):
        given.append((arguments, options))
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="Dataset scripts are no longer supported"):
        load(Path("owner/name"))
    assert given == [(("owner/name",), {})]
    assert not (tmp_path / "PWNED").exists()


def test_unknown_column_and_missing_file_list_what_exists(tmp_path):
    said = refusal(tmp_path / "f.csv", CSV, text_column="review")
    assert "no column 'review'; columns are 'text', 'label'" in said
    with pytest.raises(UserError, match=r"no file or folder .*g\.csv; .* has f\.csv"):
        load(tmp_path / "g.csv")


def test_token_id_outside_the_vocabulary(trained, tmp_path):
    """A tokenizer that gives an id beyond the word vectors, fingerprints forged too."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    result = Run.load(folder)
    size = result.tokenizer.vocabulary_size
    content = json.loads((folder / files.TOKENIZER).read_text())
    word = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][word] = size + 50_000
    (folder / files.TOKENIZER).write_text(json.dumps(content))
    forged = data.TextTokenizer.load(folder / files.TOKENIZER)
    assert forged.vocabulary_size == size
    forged_run = dataclasses.replace(result, tokenizer=forged)
    words = rf"token id {size + 50_000} in row \d+ is outside the vocabulary of {size}"
    with pytest.raises(ValueError, match=words.replace(r"\d+", "1")):
        forged_run.predict(["a film", word])
    with pytest.raises(ValueError, match=words):
        forged_run.trace(word)
    with pytest.raises(ValueError, match=words):
        data.load(result.config.data, 0, forged)
    with pytest.raises(ValueError, match=words):
        data.load_all(result.config.data, forged, result.label_names)


def test_negative_or_too_great_length():
    tokens = np.arange(3, dtype=np.int32)
    for ends in ([0, 4, 3], [0, -1, 3], [0, 2, 4], [1, 2, 3]):
        with pytest.raises(ValueError, match="offsets must rise from 0 to 3"):
            data.Examples(tokens, np.array(ends), np.zeros(2, np.float32))


@pytest.mark.parametrize("also", [False, True], ids=["tokenizer", "and summary"])
def test_vocabulary_differs_between_train_and_predict(trained, source, tmp_path, also):
    """The tokenizer of another run of the same size, and then its summary as well."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    other = tmp_path / "other.csv"
    other.write_text(source.read_text().replace("lovely", "superb"))
    tokenizer = data.load(make_config(other).data, 0).tokenizer
    assert tokenizer.vocabulary_size == trained[0].tokenizer.vocabulary_size
    tokenizer.save(folder / files.TOKENIZER)
    words = "is not the tokenizer this run was trained with"
    if also:
        summary = files.read_json(folder / files.SUMMARY)
        summary["tokenizer"] = tokenizer.fingerprint()
        files.write_json(folder / files.SUMMARY, summary)
        words = "a checkpoint in .* was made with another vocabulary"
    with pytest.raises(UserError, match=words):
        Run.load(folder)


def test_duplicate_texts_across_parts_are_counted(tmp_path):
    rows = [f"film number {'x' * n}y,{n % 2}" for n in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows, *rows[:5]]))
    (tmp_path / "b.csv").write_text("\n".join(["text,label", *rows[:7] * 2, "new,1"]))
    corpus = load(tmp_path / "a.csv", test_data=str(tmp_path / "b.csv"))
    also = corpus.summary["rows_also_in"]
    for part, earlier in (("validation", "train"), ("test", "train")):
        inside = corpus.texts[earlier]
        want = sum(text in inside for text in corpus.texts[part])
        assert also[part][earlier] == want
    assert sum(also["test"].values()) >= 14  # each of the seven stands there twice


def test_fault_in_the_last_row_of_a_large_file_is_told_before_training(
    tmp_path, capsys, no_compile
):
    """Before anything is compiled, and nothing is left behind."""
    row = "good " * 50 + ",1\n" + "bad " * 50 + ",0\n"
    rows = 10_000_000 // len(row)
    (tmp_path / "f.csv").write_text("text,label\n" + row * rows + "x,zero\n")
    argv = ("--data", str(tmp_path / "f.csv"), "--out", str(tmp_path / "run"))
    said = error_of(capsys, "train", *argv)
    assert f"line {2 * rows + 2} of " in said
    assert not (tmp_path / "run").exists()
