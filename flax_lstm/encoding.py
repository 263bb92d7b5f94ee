"""Rows into ids: before the split or after it, all of them or a process' stretch."""

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from flax_lstm.config import DataConfig
from flax_lstm.examples import Examples
from flax_lstm.partition import LabelledRows
from flax_lstm.shared_rows import SharedRows
from flax_lstm.sharing import Share
from flax_lstm.text import TextTokenizer
from flax_lstm.vocabulary import fit


def encode_all(
    counted: dict[str, LabelledRows],
    config: DataConfig,
    tokenizer: TextTokenizer | None,
    share: Share,
) -> tuple[dict[str, Examples], TextTokenizer]:
    """Encodes every row before the split, with the vocabulary of all of them."""
    texts = [text for part in counted.values() for text in part.rows.texts]
    labels = np.concatenate([part.labels[part.read] for part in counted.values()])
    before = np.cumsum([0, *map(len, counted.values())])
    rows = [
        n + part.read for n, part in zip(before[:-1], counted.values(), strict=True)
    ]
    if tokenizer is None:
        tokenizer, ids, offsets = _fit(texts, np.concatenate(rows), config, share)
    else:
        with share.together():
            ids, offsets = tokenizer.encode_flat(texts, config.max_length)
    together = Examples(ids, offsets, labels)
    ends = np.cumsum([len(part.read) for part in counted.values()])
    return {
        name: together.take(np.arange(end - len(part.read), end))
        for (name, part), end in zip(counted.items(), ends, strict=True)
    }, tokenizer


def not_empty(encoded: dict[str, Examples], share: Share) -> dict[str, np.ndarray]:
    """Returns the rows of each part that have a token."""
    return {
        name: np.flatnonzero(np.concatenate(share.arrays(rows.lengths)))
        for name, rows in encoded.items()
    }


def encode_parts(
    counted: dict[str, LabelledRows],
    picked: dict[str, tuple[str, np.ndarray]],
    config: DataConfig,
    tokenizer: TextTokenizer | None,
    share: Share,
) -> tuple[dict[str, Examples], TextTokenizer]:
    """Encodes the parts of the split, with the vocabulary of the training part."""
    examples = {}
    for name, (origin, rows) in picked.items():
        part = counted[origin]
        mine = part.held(rows)
        texts = part.texts(rows[mine])
        if tokenizer is None:
            tokenizer, ids, offsets = _fit(texts, mine, config, share)
        else:
            with share.together():
                ids, offsets = tokenizer.encode_flat(texts, config.max_length)
        examples[name] = Examples(ids, offsets, part.labels[rows[mine]])
    assert tokenizer is not None  # the training part is first
    return examples, tokenizer


def _fit(
    texts: list[str], rows: np.ndarray, config: DataConfig, share: Share
) -> tuple[TextTokenizer, np.ndarray, np.ndarray]:
    """Fits a tokenizer to the texts of these rows and of those of the others."""
    return fit(texts, config, share=share, rows=None if share.whole else rows)


def with_lengths(
    mine: Examples, part: LabelledRows, rows: np.ndarray, share: Share
) -> SharedRows:
    """Returns what all know of the given rows of a part, with the ids held here."""
    holders = part.holders(rows)
    lengths = np.zeros(len(rows), np.int64)
    for process, found in enumerate(share.arrays(mine.lengths)):
        lengths[holders == process] = found
    return SharedRows(lengths, part.labels[rows], holders, share.process, mine)


def identities(texts: list[str], share: Share) -> Sequence[Hashable]:
    """Returns what is equal where texts are, of the texts of all processes."""
    if share.whole:
        return texts
    size = 16  # equal for two of 2**40 different texts once in 2**49 corpora
    raw = (text.encode("utf-8", "surrogatepass") for text in texts)
    mine = b"".join(hashlib.blake2b(one, digest_size=size).digest() for one in raw)
    found = np.concatenate(share.arrays(np.frombuffer(mine, np.uint8)))
    return [row.tobytes() for row in found.reshape(-1, size)]


def truncate(examples: Examples, max_length: int) -> Examples:
    """Cuts every row to `max_length` tokens."""
    lengths = np.minimum(examples.lengths, max_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shift = np.repeat(examples.offsets[:-1] - offsets[:-1], lengths)
    tokens = examples.tokens[np.arange(offsets[-1]) + shift]
    return Examples(tokens, offsets, examples.labels)
