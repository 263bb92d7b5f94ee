"""From a text source to encoded, split and batched examples: the one entry is `load`.

sources.py reads rows, labels.py finds the two classes, partition.py splits, encoding.py
turns words into ids, batching.py makes the batches; their public names are
here too. sharing.py says what each does of it where several processes train one run.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_lstm.batching import (
    Batch,
    PlannedBatch,
    batch_count,
    batch_plan,
    batches,
    left_of,
    padded_lengths,
    prefetch,
)
from flax_lstm.config import DataConfig, UserError
from flax_lstm.encoding import (
    encode_all,
    encode_parts,
    identities,
    not_empty,
    truncate,
    with_lengths,
)
from flax_lstm.examples import Examples, Measured
from flax_lstm.labels import Classes, classes_named, find_classes, tally, to_numbers
from flax_lstm.partition import PARTS, LabelledRows, shared_groups, split
from flax_lstm.shared_rows import SharedRows, fed_batches, feed
from flax_lstm.sharing import ALONE, Share, share_of_this_process
from flax_lstm.sources import Rows, Source, read
from flax_lstm.text import Encoded, TextTokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Encoded",
    "Examples",
    "PlannedBatch",
    "SharedRows",
    "TextTokenizer",
    "batch_count",
    "batch_plan",
    "batches",
    "fed_batches",
    "feed",
    "left_of",
    "load",
    "load_all",
    "padded_lengths",
    "prefetch",
    "share_of_this_process",
]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything that training and testing need to know about the data.

    Attributes:
      parts: Encoded rows of "train", "validation" and "test"; none where several
        processes share them.
      texts: The raw text of every row of `parts`.
      tokenizer: The fitted pipeline.
      label_names: Negative and positive class as the source names them.
      bucket_lengths: Padded lengths, chosen on the training part.
      summary: Counts for a person to look at, and to keep with the run (plain JSON).
      shared: The parts where several processes share them, else none.
    """

    parts: dict[str, Examples]
    texts: dict[str, list[str]]
    tokenizer: TextTokenizer
    label_names: tuple[str, str]
    bucket_lengths: tuple[int, ...]
    summary: dict[str, Any]
    shared: dict[str, SharedRows] = dataclasses.field(default_factory=dict)

    @property
    def measured(self) -> Mapping[str, Measured]:
        """The parts as the plan of an epoch sees them, shared or not."""
        return self.shared or self.parts


def load(
    config: DataConfig,
    seed: int,
    tokenizer: TextTokenizer | None = None,
    *,
    share: Share = ALONE,
) -> Corpus:
    """Reads, splits and encodes a source.

    Parts that the source has are kept; the others are split off its training part, by
    rows or by groups, as `seed` alone decides.

    Args:
      config: Source, columns, fractions, pipeline.
      seed: Seed of the split.
      tokenizer: Encodes with this one instead of fitting one, to evaluate a run.
      share: Which stretch of the rows this process reads and encodes; all when it is
        alone. Else all processes must call this, and what is counted is counted over
        all: only the ids of the rows lie apart.

    Raises:
      UserError: If the data cannot be read or cannot be used as they are.
    """
    with share.together():
        _check(config)
    source, other = read(config.data, config, share), None
    parts = dict(source.parts)
    if config.test_data is not None:
        other = read(config.test_data, config, share)
        parts["test"] = _only_part(other)
    parts = {name: parts[name] for name in PARTS if name in parts}
    share.agree(parts=list(parts))
    classes, counted = _labelled(parts, share)
    if config.pipeline == "tutorial":
        encoded, tokenizer = encode_all(counted, config, tokenizer, share)
        picked = split(counted, config, seed, not_empty(encoded, share))
        examples = {}
        for name, (origin, rows) in picked.items():
            part = counted[origin]
            mine = rows[part.held(rows)] - part.starts[part.process]
            examples[name] = encoded[origin].take(mine)
    else:
        picked = split(counted, config, seed, None)
        examples, tokenizer = encode_parts(counted, picked, config, tokenizer, share)
    with share.together():
        texts = {
            name: counted[origin].texts(rows[counted[origin].held(rows)])
            for name, (origin, rows) in picked.items()
        }
        most = config.max_length
        longer = {n: int(np.sum(e.lengths > most)) for n, e in examples.items()}
        examples = {
            name: truncate(e, most).check_ids(tokenizer.vocabulary_size)
            for name, e in examples.items()
        }
        unknown = {n: tokenizer.count_unknown(e.tokens) for n, e in examples.items()}
    cut, unknown = (_add_up(share.gather(counts)) for counts in (longer, unknown))
    shared = {}
    if not share.whole:
        shared = {
            name: with_lengths(examples[name], counted[origin], rows, share)
            for name, (origin, rows) in picked.items()
        }
    measured: Mapping[str, Examples | SharedRows] = shared or examples
    names = {n: identities(t, share) for n, t in texts.items()}
    _check_words(measured["train"], unknown["train"], config)
    lengths = padded_lengths(measured["train"], config)
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
        **_counts(measured, names, unknown, classes.names),
        "truncated": cut,
        "dropped_empty": sum(map(len, counted.values()))
        - sum(len(e) for e in measured.values()),
        "groups_in_several_parts": shared_groups(counted, picked),
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer": tokenizer.fingerprint(),
        "bucket_lengths": list(lengths),
    }
    if shared:
        examples, texts = {}, {}
    return Corpus(examples, texts, tokenizer, classes.names, lengths, summary, shared)


def load_all(
    config: DataConfig, tokenizer: TextTokenizer, label_names: tuple[str, str]
) -> tuple[Examples, list[str], dict[str, Any]]:
    """Reads a source to evaluate an earlier run on: its test part, or all its rows.

    Args:
      config: `data` and the columns are used.
      tokenizer: That of the run.
      label_names: Those of the run; the source must use the same labels.

    Returns:
      The rows, their texts, and their counts, with `part` None where they are all that
      the source has. No row is dropped.

    Raises:
      UserError: If the source cannot be read or has other labels.
    """
    source = read(config.data, config)
    rows = source.parts.get("test", source.parts["train"])
    labels = to_numbers(rows.labels, rows.where, classes_named(label_names))
    ids, offsets = tokenizer.encode_flat(rows.texts, tokenizer.max_length)
    examples = Examples(ids, offsets, labels)
    cut = int(np.sum(examples.lengths > tokenizer.max_length))
    examples = truncate(examples, tokenizer.max_length)
    examples.check_ids(tokenizer.vocabulary_size)
    texts = list(rows.texts)
    unknown = {"test": tokenizer.count_unknown(examples.tokens)}
    summary = {
        "source": {"description": source.description, "sha256": source.sha256},
        "part": "test" if "test" in source.parts else None,
        **_counts({"test": examples}, {"test": texts}, unknown, label_names),
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


def _labelled(
    parts: dict[str, Rows], share: Share
) -> tuple[Classes, dict[str, LabelledRows]]:
    """Finds the classes over all parts, and 0 or 1 for every row."""
    with share.together():
        tallies = {n: tally(rows.labels, rows.where) for n, rows in parts.items()}
    said = share.gather(tallies)
    with share.together():
        classes = find_classes(of[name] for name in parts for of in said)
        numbers = {
            n: to_numbers(rows.labels, rows.where, classes) for n, rows in parts.items()
        }
    counted = {}
    for name, rows in parts.items():
        labels = share.arrays(numbers[name])
        if rows.groups is not None:
            groups = [g for of in share.gather(list(rows.groups)) for g in of]
            rows = dataclasses.replace(rows, groups=groups)
        starts = np.cumsum([0, *map(len, labels[:-1])]).tolist()
        counted[name] = LabelledRows(
            rows, np.concatenate(labels), tuple(starts), share.process
        )
    if len(np.unique(counted["train"].labels)) < 2:
        raise UserError(
            "the training part has one class only; it needs rows of both "
            f"{classes.names[0]!r} and {classes.names[1]!r}."
        )
    return classes, counted


def _check_words(train: Measured, unknown: int, config: DataConfig) -> None:
    """Raises UserError where there is nothing to read in the training part."""
    tokens = int(train.lengths.sum())
    if not tokens:
        raise UserError(
            "no text of the training part has a word in it; is it the right "
            "--text-column?"
        )
    if unknown == tokens:
        raise UserError(
            f"no word occurs {config.min_count} times in the training part, so every "
            "word is an unknown one; lower --min-count, or give more data."
        )


def _add_up(counts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(of[name] for of in counts) for name in counts[0]}


def _counts(
    examples: Mapping[str, Examples | SharedRows],
    texts: Mapping[str, Sequence[Hashable]],
    unknown: dict[str, int],
    names: tuple[str, str],
) -> dict[str, Any]:
    """Returns what the parts hold, and which texts they share."""
    distinct = {name: set(rows) for name, rows in texts.items()}
    parts_with = Counter(text for rows in distinct.values() for text in rows)
    names_of_parts = list(texts)
    positive = {name: int(e.labels.sum()) for name, e in examples.items()}
    tokens = {name: int(e.lengths.sum()) for name, e in examples.items()}
    return {
        "rows": {name: len(e) for name, e in examples.items()},
        "classes": {
            name: {names[0]: len(e) - positive[name], names[1]: positive[name]}
            for name, e in examples.items()
        },
        "tokens": tokens,
        "longest": {
            name: int(max(e.lengths, default=0)) for name, e in examples.items()
        },
        "empty_texts": {
            name: int(np.sum(e.lengths == 0)) for name, e in examples.items()
        },
        "unknown_share": {
            name: unknown[name] / count if count else 0.0
            for name, count in tokens.items()
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
