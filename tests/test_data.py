"""Loading end to end: parts, splits, vocabulary, summary; and on the real files."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_lstm.batching import batches
from flax_lstm.config import TUTORIAL, DataConfig, UserError
from flax_lstm.data import load, load_all
from flax_lstm.labels import classes_named, to_numbers
from flax_lstm.partition import LabelledRows, split
from flax_lstm.sources import read

SHARED = Path(__file__).parents[2] / "shared" / "data"
STOCKTWITS = SHARED / "stocktwits_spy_2017.parquet"
needs_shared = pytest.mark.skipif(
    not STOCKTWITS.exists(), reason="needs ../shared/data, no part of the project"
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def reviews(tmp_path):
    """60 rows: distinct texts, but for two repeated ones and two empty ones."""
    rows = [
        {"text": f"film number {'x' * i}y is {'good' if i % 2 else 'bad'}"}
        | {"label": i % 2}
        for i in range(60)
    ]
    rows[10]["text"] = rows[11]["text"] = "the same text"
    rows[20]["text"] = rows[21]["text"] = ""
    for i, row in enumerate(rows):
        row["film"] = f"film {i // 4}"
    return write(tmp_path / "reviews.jsonl", rows)


@pytest.mark.parametrize("pipeline", ["words", "tutorial"])
def test_a_split_holds_every_row_once_and_depends_on_the_seed(reviews, pipeline):
    config = DataConfig(data=reviews, pipeline=pipeline, max_length=40)
    corpus = load(config, seed=1)
    texts = [text for part in corpus.texts.values() for text in part]
    want = [row["text"] for row in rows_of(reviews)]
    dropped = 2 if pipeline == "tutorial" else 0
    assert Counter(texts) == Counter(t for t in want if t or not dropped)
    assert corpus.summary["dropped_empty"] == dropped
    sizes = [len(corpus.parts[part]) for part in ("train", "validation", "test")]
    assert sizes == ([46, 6, 6] if dropped else [48, 6, 6])
    assert load(config, seed=1).texts == corpus.texts
    assert load(config, seed=2).texts != corpus.texts


@pytest.mark.parametrize("pipeline", ["words", "tutorial"])
def test_texts_ids_and_labels_stay_together(reviews, pipeline):
    corpus = load(DataConfig(data=reviews, pipeline=pipeline, min_count=1), seed=0)
    by_text = {
        row["text"]: row["label"] for row in rows_of(reviews) if "number" in row["text"]
    }
    for name, part in corpus.parts.items():
        encoded = corpus.tokenizer.encode(corpus.texts[name])
        assert len(encoded) == len(part)
        for row, (text, ids) in enumerate(
            zip(corpus.texts[name], encoded, strict=True)
        ):
            assert np.array_equal(part[row][0], ids)
            assert part[row][1] == by_text.get(text, part[row][1])


def test_the_vocabulary_is_of_the_training_part_alone(reviews):
    corpus = load(DataConfig(data=reviews, min_count=1), seed=0)
    seen = {word for text in corpus.texts["train"] for word in text.split()}
    assert corpus.tokenizer.vocabulary_size == 2 + len(seen)
    assert corpus.summary["unknown_share"]["train"] == 0
    assert corpus.summary["unknown_share"]["test"] > 0
    whole = load(DataConfig(data=reviews, pipeline="tutorial"), seed=0)
    assert whole.tokenizer.vocabulary_size > corpus.tokenizer.vocabulary_size
    assert whole.summary["unknown_share"]["test"] == 0


def test_groups_stay_in_one_part(reviews):
    corpus = load(DataConfig(data=reviews, group_column="film"), seed=0)
    film_of = {
        row["text"]: row["film"] for row in rows_of(reviews) if "number" in row["text"]
    }
    films = [
        {film_of[text] for text in part if text in film_of}
        for part in corpus.texts.values()
    ]
    assert not films[0] & films[1]
    assert not films[0] & films[2]
    assert not films[1] & films[2]
    assert corpus.summary["groups_in_several_parts"] == 0
    assert sum(corpus.summary["rows"].values()) == 60


def test_too_few_groups_to_split_are_refused(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2, "film": "one"} for i in range(30)]
    path = write(tmp_path / "file.jsonl", rows)
    with pytest.raises(UserError, match="part would be empty: 30 rows have too few gr"):
        load(DataConfig(data=path, group_column="film"), seed=0)


def test_a_second_source_is_the_test_part(reviews, tmp_path):
    rows = [{"text": "the same text", "label": 1}, {"text": "good", "label": 1}]
    other = write(tmp_path / "other.jsonl", rows)
    corpus = load(DataConfig(data=reviews, test_data=other), seed=0)
    assert corpus.texts["test"] == ["the same text", "good"]
    assert corpus.summary["rows"] == {"train": 54, "validation": 6, "test": 2}
    assert corpus.summary["classes"]["test"] == {"0": 0, "1": 2}
    assert corpus.summary["test_source"]["description"] == other


def test_the_summary_counts_what_a_loop_counts(reviews):
    corpus = load(DataConfig(data=reviews, max_length=5), seed=3)
    summary = corpus.summary
    json.dumps(summary)
    before = {}
    for name, texts in corpus.texts.items():
        assert summary["empty_texts"][name] == sum(text == "" for text in texts)
        assert summary["truncated"][name] == sum(len(t.split()) > 5 for t in texts)
        assert summary["distinct_texts"][name] == len(set(texts))
        also = {n: sum(text in rows for text in texts) for n, rows in before.items()}
        assert summary["rows_also_in"].get(name, {}) == also
        before[name] = texts
    assert any(any(also.values()) for also in summary["rows_also_in"].values())
    shared = [
        text
        for text in {t for part in corpus.texts.values() for t in part}
        if sum(text in part for part in corpus.texts.values()) > 1
    ]
    assert summary["texts_in_several_parts"] == len(shared)
    assert summary["labels"]["rule"] == "the larger number is positive"


@pytest.mark.parametrize("pipeline", ["words", "tutorial"])
def test_a_saved_tokenizer_gives_the_same_corpus(reviews, pipeline):
    config = DataConfig(data=reviews, pipeline=pipeline)
    first = load(config, seed=0)
    again = load(config, seed=0, tokenizer=first.tokenizer)
    for name, part in first.parts.items():
        assert np.array_equal(part.tokens, again.parts[name].tokens)
        assert np.array_equal(part.offsets, again.parts[name].offsets)
        assert np.array_equal(part.labels, again.parts[name].labels)


def test_other_data_are_read_with_the_tokenizer_and_labels_of_a_run(reviews, tmp_path):
    run = load(DataConfig(data=reviews), seed=0)
    path = tmp_path / "more.csv"
    path.write_text("text,label\nbad film,0\n,1\nunheard of,1\n")
    config = DataConfig(data=str(path))
    examples, texts, summary = load_all(config, run.tokenizer, run.label_names)
    assert texts == ["bad film", "", "unheard of"]
    assert examples.labels.tolist() == [0, 1, 1]
    assert summary["empty_texts"]["test"] == 1
    path.write_text("text,label\nbad film,good\n")
    with pytest.raises(UserError, match="has the label 'good'; expected '0' or '1'"):
        load_all(config, run.tokenizer, run.label_names)


def test_empty_texts_are_batched_with_length_zero(reviews):
    corpus = load(DataConfig(data=reviews), seed=0)
    lengths = [
        batch.lengths[batch.weights > 0]
        for part in corpus.parts.values()
        for batch in batches(
            part, corpus.bucket_lengths, DataConfig(), seed=0, epoch=None
        )
    ]
    assert (np.concatenate(lengths) == 0).sum() == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 1), ("b", 1)], "exactly two classes; found 1"),
        ([("a", 0), ("b", 1), ("c", 2)], "exactly two classes; found 3"),
        ([("a", 0), ("b", 1)] * 10, "no word occurs 99 times in the training part"),
        ([("", 0), ("  ", 1)] * 10, "no text of the training part has a word in it"),
        ([("a", 0), ("b", 1)], "part would be empty: 2 rows are too few to split"),
        ([("a", 0), ("b", "zero"), ("c", 1)], "line 2 of .*unknown label 'zero'"),
    ],
)
def test_data_that_cannot_be_learned_from_are_refused(rows, message, tmp_path):
    path = write(
        tmp_path / "f.jsonl", [{"text": text, "label": label} for text, label in rows]
    )
    with pytest.raises(UserError, match=message):
        load(DataConfig(data=path, min_count=99), seed=0)


def test_one_class_left_for_training_is_refused(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"text": "a", "label": 1}] * 20)
    test = write(tmp_path / "b.jsonl", [{"text": "b", "label": 0}])
    with pytest.raises(UserError, match="training part has one class only"):
        load(DataConfig(data=train, test_data=test), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"max_length": -1}, "max_length must be 1 or more; got -1"),
        ({"validation_fraction": 1.5}, "validation_fraction must lie between"),
        ({"test_fraction": float("nan")}, "test_fraction must lie between"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "nothing to train on"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        load(replace(DataConfig(), **change), seed=0)


@needs_shared
def test_the_tutorials_corpus_has_its_published_counts():
    config = replace(TUTORIAL.data, data=str(STOCKTWITS), max_length=40)
    corpus = load(config, seed=0)
    summary = corpus.summary
    assert summary["rows"] == {"train": 77_572, "validation": 9_697, "test": 9_697}
    assert summary["dropped_empty"] == 1
    assert summary["vocabulary_size"] == 31_981
    assert sum(summary["tokens"].values()) == 1_267_980
    assert max(summary["longest"].values()) == 39
    positive = sum(counts["1"] for counts in summary["classes"].values())
    assert positive == 53_704 - 1  # the dropped row is bullish
    counts = [
        sum(1 for _ in batches(part, (40,), config, seed=0, epoch=epoch))
        for part, epoch in [(corpus.parts["train"], 0), (corpus.parts["test"], 0)]
    ]
    assert counts == [303, 37]


@needs_shared
def test_imdb_is_split_by_film():
    """No film in two parts, and no part of small films alone, which are negative."""
    config = DataConfig(data=str(SHARED / "imdb_train.parquet"), group_column="movie")
    rows = read(config.data, config).parts["train"]
    labels = to_numbers(rows.labels, rows.where, classes_named(("0", "1")))
    source = LabelledRows(rows, labels)
    picked = split({"train": source}, config, 0, None)
    assert sorted(np.concatenate([r for _, r in picked.values()])) == list(
        range(25_000)
    )
    for part, share in [("train", 0.8), ("validation", 0.1), ("test", 0.1)]:
        held = picked[part][1]
        assert abs(len(held) - 25_000 * share) < 30  # the most reviews of one film
        assert abs(labels[held].mean() - 0.5) < 0.05
    films = [set(source.groups(r) or ()) for _, r in picked.values()]
    assert len(set.union(*films)) == sum(map(len, films)) == 3_456
