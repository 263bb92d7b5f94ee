"""From a text source to encoded, split and batched examples: the one entry is `load`.

sources.py reads rows, labels.py finds the two classes, text.py turns words into ids,
batching.py makes the batches; their public names are here too.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_lstm.batching import (
    Batch,
    Examples,
    PlannedBatch,
    batch_count,
    batch_plan,
    batches,
    padded_lengths,
    prefetch,
)
from flax_lstm.config import DataConfig, UserError
from flax_lstm.labels import Classes, classes_named, find_classes, to_numbers
from flax_lstm.partition import PARTS, LabelledRows, shared_groups, split
from flax_lstm.sources import Rows, Source, read
from flax_lstm.text import Encoded, TextTokenizer, fit

__all__ = [
    "Batch",
    "Corpus",
    "Encoded",
    "Examples",
    "PlannedBatch",
    "TextTokenizer",
    "batch_count",
    "batch_plan",
    "batches",
    "load",
    "load_all",
    "padded_lengths",
    "prefetch",
]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything that training and testing need to know about the data.

    Attributes:
      parts: Encoded rows of "train", "validation" and "test".
      texts: The raw text of every row of `parts`.
      tokenizer: The fitted pipeline.
      label_names: Negative and positive class as the source names them.
      bucket_lengths: Padded lengths, chosen on the training part.
      summary: Counts for a person to look at, and to keep with the run (plain JSON).
    """

    parts: dict[str, Examples]
    texts: dict[str, list[str]]
    tokenizer: TextTokenizer
    label_names: tuple[str, str]
    bucket_lengths: tuple[int, ...]
    summary: dict[str, Any]


def load(
    config: DataConfig, seed: int, tokenizer: TextTokenizer | None = None
) -> Corpus:
    """Reads, splits and encodes a source.

    Parts that the source has are kept; the others are split off its training part, by
    rows or by groups, as `seed` alone decides.

    Args:
      config: Source, columns, fractions, pipeline.
      seed: Seed of the split.
      tokenizer: Encodes with this one instead of fitting one, to evaluate a run.

    Raises:
      UserError: If the data cannot be read or cannot be used as they are.
    """
    _check(config)
    source, other = read(config.data, config), None
    parts = dict(source.parts)
    if config.test_data is not None:
        other = read(config.test_data, config)
        parts["test"] = _only_part(other)
    parts = {name: parts[name] for name in PARTS if name in parts}
    classes, numbers = _numbers(parts)
    counted = {n: LabelledRows(rows, numbers[n]) for n, rows in parts.items()}
    if config.pipeline == "tutorial":
        encoded, tokenizer = _encode_all(counted, config, tokenizer)
        picked = split(counted, config, seed, _not_empty(encoded))
        examples = {n: encoded[p].take(rows) for n, (p, rows) in picked.items()}
    else:
        picked = split(counted, config, seed, None)
        examples, tokenizer = _encode_parts(counted, picked, config, tokenizer)
    texts = {n: counted[p].texts(rows) for n, (p, rows) in picked.items()}
    cut = {n: int(np.sum(e.lengths > config.max_length)) for n, e in examples.items()}
    examples = {
        name: _truncate(e, config.max_length).check_ids(tokenizer.vocabulary_size)
        for name, e in examples.items()
    }
    _check_words(examples["train"], tokenizer, config)
    lengths = padded_lengths(examples["train"], config)
    summary = {
        "source": {"description": source.description, "sha256": source.sha256},
        "test_source": other
        and {"description": other.description, "sha256": other.sha256},
        "notes": [*source.notes, *(other.notes if other else ())],
        "labels": {
            "negative": classes.names[0],
            "positive": classes.names[1],
            "rule": classes.rule,
        },
        **_counts(examples, texts, tokenizer, classes.names),
        "truncated": cut,
        "dropped_empty": sum(map(len, counted.values()))
        - sum(len(e) for e in examples.values()),
        "groups_in_several_parts": shared_groups(counted, picked),
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer": tokenizer.fingerprint(),
        "bucket_lengths": list(lengths),
    }
    return Corpus(examples, texts, tokenizer, classes.names, lengths, summary)


def load_all(
    config: DataConfig, tokenizer: TextTokenizer, label_names: tuple[str, str]
) -> tuple[Examples, list[str], dict[str, Any]]:
    """Reads a source to evaluate an earlier run on: its test part, or all its rows.

    Args:
      config: `data` and the columns are used.
      tokenizer: That of the run.
      label_names: Those of the run; the source must use the same labels.

    Returns:
      The rows, their texts, and their counts. No row is dropped.

    Raises:
      UserError: If the source cannot be read or has other labels.
    """
    source = read(config.data, config)
    rows = source.parts.get("test", source.parts["train"])
    labels = to_numbers(rows.labels, rows.where, classes_named(label_names))
    ids, offsets = tokenizer.encode_flat(rows.texts, tokenizer.max_length)
    examples = Examples(ids, offsets, labels)
    cut = int(np.sum(examples.lengths > tokenizer.max_length))
    examples = _truncate(examples, tokenizer.max_length)
    examples.check_ids(tokenizer.vocabulary_size)
    texts = list(rows.texts)
    summary = {
        "source": {"description": source.description, "sha256": source.sha256},
        **_counts({"test": examples}, {"test": texts}, tokenizer, label_names),
        "truncated": {"test": cut},
    }
    return examples, texts, summary


def _check(config: DataConfig) -> None:
    for name in ("max_length", "batch_size", "buckets", "vocabulary_size"):
        if getattr(config, name) < 1:
            raise UserError(
                f"{name} must be 1 or more; got {getattr(config, name)}. Correct "
                f"--{name.replace('_', '-')}."
            )
    for name in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(
                f"{name} must lie between 0 and 1; got {getattr(config, name)}."
            )
    if config.validation_fraction + config.test_fraction >= 1:
        raise UserError(
            "validation_fraction and test_fraction leave nothing to train on: "
            f"{config.validation_fraction} + {config.test_fraction}."
        )


def _only_part(source: Source) -> Rows:
    """Returns the test part of a second source: its own, or its only one."""
    if "test" in source.parts:
        return source.parts["test"]
    return source.parts["train"]


def _numbers(parts: dict[str, Rows]) -> tuple[Classes, dict[str, np.ndarray]]:
    """Finds the classes over all parts, and 0 or 1 for every row."""
    labels = [label for rows in parts.values() for label in rows.labels]
    where = _Joined([rows.where for rows in parts.values()])
    classes = find_classes(labels, where)
    numbers = {
        n: to_numbers(rows.labels, rows.where, classes) for n, rows in parts.items()
    }
    if len(np.unique(numbers["train"])) < 2:
        raise UserError(
            "the training part has one class only; it needs rows of both "
            f"{classes.names[0]!r} and {classes.names[1]!r}."
        )
    return classes, numbers


def _check_words(train: Examples, tokenizer: TextTokenizer, config: DataConfig) -> None:
    """Raises UserError where there is nothing to read in the training part."""
    if not len(train.tokens):
        raise UserError(
            "no text of the training part has a word in it; is it the right "
            "--text-column?"
        )
    if tokenizer.unknown_share(train.tokens) == 1:
        raise UserError(
            f"no word occurs {config.min_count} times in the training part, so every "
            "word is an unknown one; lower --min-count, or give more data."
        )


class _Joined(Sequence):
    """Sequences end to end, without copying their items."""

    def __init__(self, sequences: Sequence[Sequence[str]]):
        self._sequences = sequences

    def __len__(self) -> int:
        return sum(map(len, self._sequences))

    def __getitem__(self, row):
        for sequence in self._sequences:
            if row < len(sequence):
                return sequence[row]
            row -= len(sequence)
        raise IndexError(row)


def _encode_all(
    counted: dict[str, LabelledRows],
    config: DataConfig,
    tokenizer: TextTokenizer | None,
) -> tuple[dict[str, Examples], TextTokenizer]:
    """Encodes every row before the split, with the vocabulary of all of them."""
    texts = [text for part in counted.values() for text in part.rows.texts]
    labels = np.concatenate([part.labels for part in counted.values()])
    if tokenizer is None:
        tokenizer, ids, offsets = fit(texts, config)
    else:
        ids, offsets = tokenizer.encode_flat(texts, config.max_length)
    together = Examples(ids, offsets, labels)
    ends = np.cumsum([len(part) for part in counted.values()])
    return {
        name: together.take(np.arange(end - len(part), end))
        for (name, part), end in zip(counted.items(), ends, strict=True)
    }, tokenizer


def _not_empty(encoded: dict[str, Examples]) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(rows.lengths) for name, rows in encoded.items()}


def _encode_parts(
    counted: dict[str, LabelledRows],
    picked: dict[str, tuple[str, np.ndarray]],
    config: DataConfig,
    tokenizer: TextTokenizer | None,
) -> tuple[dict[str, Examples], TextTokenizer]:
    """Encodes the parts of the split, with the vocabulary of the training part."""
    examples = {}
    for name, (origin, rows) in picked.items():
        part = counted[origin]
        texts = part.texts(rows)
        if tokenizer is None:
            tokenizer, ids, offsets = fit(texts, config)
        else:
            ids, offsets = tokenizer.encode_flat(texts, config.max_length)
        examples[name] = Examples(ids, offsets, part.labels[rows])
    assert tokenizer is not None  # the training part is first
    return examples, tokenizer


def _truncate(examples: Examples, max_length: int) -> Examples:
    lengths = np.minimum(examples.lengths, max_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shift = np.repeat(examples.offsets[:-1] - offsets[:-1], lengths)
    tokens = examples.tokens[np.arange(offsets[-1]) + shift]
    return Examples(tokens, offsets, examples.labels)


def _counts(
    examples: dict[str, Examples],
    texts: dict[str, list[str]],
    tokenizer: TextTokenizer,
    names: tuple[str, str],
) -> dict[str, Any]:
    """Returns what the parts hold, and which texts they share."""
    distinct = {name: set(rows) for name, rows in texts.items()}
    parts_with = Counter(text for rows in distinct.values() for text in rows)
    names_of_parts = list(texts)
    positive = {name: int(e.labels.sum()) for name, e in examples.items()}
    return {
        "rows": {name: len(e) for name, e in examples.items()},
        "classes": {
            name: {names[0]: len(e) - positive[name], names[1]: positive[name]}
            for name, e in examples.items()
        },
        "tokens": {name: len(e.tokens) for name, e in examples.items()},
        "longest": {
            name: int(max(e.lengths, default=0)) for name, e in examples.items()
        },
        "empty_texts": {
            name: int(np.sum(e.lengths == 0)) for name, e in examples.items()
        },
        "unknown_share": {
            name: tokenizer.unknown_share(e.tokens) for name, e in examples.items()
        },
        "distinct_texts": {name: len(rows) for name, rows in distinct.items()},
        "texts_in_several_parts": sum(n > 1 for n in parts_with.values()),
        "rows_also_in": {  # of each part, by the part before it that has the text too
            name: {
                earlier: sum(text in distinct[earlier] for text in texts[name])
                for earlier in names_of_parts[:place]
            }
            for place, name in enumerate(names_of_parts)
            if place
        },
    }
