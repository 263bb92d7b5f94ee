"""From text to token ids, through `tokenizers` at word level.

A pipeline is a normaliser, a splitter and a vocabulary, all kept in one
`tokenizer.json` that `tokenizers` reads without this package.

`words`     lower case; words (with their apostrophes and a leading $ # @) and single
            punctuation marks; `<br />` and control characters separate. Ids: 0
            padding, 1 unknown word, then by falling frequency.
`tutorial`  the eleven steps of the tutorial's message preprocessing. Ids: 0 padding,
            then by falling frequency. There is no vector for an unknown word: such
            words are skipped, and counted.

Ties in frequency go to the word that appears first.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from flax_lstm.config import UserError, read_limited

if TYPE_CHECKING:  # imported where used, so that training runs without it
    import tokenizers

PAD, UNKNOWN = "<pad>", "<unk>"
RULES = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")
"""What of a tokenizer.json decides, beside the words, which ids a text becomes."""
CHUNK_TEXTS, CHUNK_CHARACTERS = 1000, 4_000_000
"""Texts encoded at a time, which bounds the memory of the intermediate objects."""
MOST_CHARACTERS = 1_000_000
"""Read of one text at the most, unless far more tokens than usual are to be kept."""
MARGIN = 8
"""Last tokens not trusted where a long text was cut in the middle of something."""


class Encoded(NamedTuple):
    """One text as the model sees it.

    Attributes:
      ids: Token ids, `max_length` at the most.
      words: The word of each id; an unknown word as it was written, in lower case.
      unknown: Words of the text, within its kept part, that are not known.
      truncated: Whether the text had more tokens than were kept.
    """

    ids: Int32[np.ndarray, "n"]
    words: list[str]
    unknown: int
    truncated: bool


class TextTokenizer:
    """A fitted pipeline: encodes texts, knows its words, saves and loads itself."""

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        pipeline: Literal["words", "tutorial"],
        max_length: int,
        rules: dict[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        # As the file writes them: another version may put the same in other words.
        content = json.loads(tokenizer.to_str()) if rules is None else rules
        self._rules = [content.get(name) for name in RULES]
        self._unknown_id: int = tokenizer.get_vocab()[UNKNOWN]
        self.pipeline = pipeline
        self.max_length = max_length
        # The tutorial's unknown id stands behind the vocabulary and never leaves here.
        size = tokenizer.get_vocab_size()
        self.vocabulary_size = size if pipeline == "words" else size - 1

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "n"]]:
        """Returns the ids of each text, `max_length` at the most."""
        ids, offsets = self.encode_flat(texts, self.max_length)
        return [ids[a:b][: self.max_length] for a, b in itertools.pairwise(offsets)]

    def tokens(self, text: str) -> list[str]:
        """Returns the words of a text, one for each id of `encode`."""
        return self.analyse([text])[0].words

    def analyse(self, texts: Sequence[str]) -> list[Encoded]:
        """Returns ids, words, and what was unknown or cut off, of each text."""
        results = []
        for text in texts:
            cut, encoding = self._encode_one(text, self.max_length)
            ids = np.array(encoding.ids, np.int32)
            known = ids != self._unknown_id
            words = [
                cut[a:b].lower() if word == UNKNOWN else word
                for word, (a, b) in zip(encoding.tokens, encoding.offsets, strict=True)
            ]
            words_only = self.pipeline == "words"
            keep = np.arange(len(ids)) if words_only else np.flatnonzero(known)
            kept = keep[: self.max_length]
            truncated = len(keep) > self.max_length
            end = int(kept[-1]) + 1 if truncated and len(kept) else len(ids)
            results.append(
                Encoded(
                    ids[kept],
                    [words[i] for i in kept],
                    int(np.sum(~known[:end])),
                    truncated,
                )
            )
        return results

    def encode_flat(
        self, texts: Sequence[str], limit: int | None
    ) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "ends"]]:
        """Returns the ids of all texts end to end, and where each begins and ends.

        Args:
          texts: The texts.
          limit: Tokens of a text that will be used. Texts far longer than that are
            not read to their end, so a row may have somewhat more ids, never fewer.
        """
        parts, lengths = [np.zeros(0, np.int32)], [0]
        for chunk in chunks(texts, limit):
            if len(chunk) == 1:
                encodings = [self._encode_one(chunk[0], limit)[1]]
            else:
                encodings = self._tokenizer.encode_batch_fast(
                    chunk, add_special_tokens=False
                )
            for encoding in encodings:
                ids = np.array(encoding.ids, np.int32)
                if self.pipeline == "tutorial":
                    ids = ids[ids != self._unknown_id]
                parts.append(ids)
                lengths.append(len(ids))
        return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)

    def _encode_one(self, text: str, limit: int | None) -> tuple[str, Any]:
        """Returns a text cut where `limit` sound tokens are safe, and its encoding."""
        most = _most(limit)
        text = _well_formed(text[:most])
        size = most if limit is None else _cut_size(limit)
        while True:
            cut = text[:size]
            encoding = self._tokenizer.encode(cut, add_special_tokens=False)
            ids = encoding.ids
            known = len(ids) - (
                ids.count(self._unknown_id) if self.pipeline == "tutorial" else 0
            )
            if size >= len(text) or known > (limit or 0) + MARGIN:
                return cut, encoding
            size *= 4

    def ids(self) -> dict[str, int]:
        """Returns the id of every word."""
        return self._tokenizer.get_vocab()

    def count_unknown(self, ids: Int32[np.ndarray, "N"]) -> int:
        """Counts the unknown word; 0 where such words are skipped."""
        return int(np.count_nonzero(ids == self._unknown_id))

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`, the maximum length as its truncation."""
        self._tokenizer.enable_truncation(self.max_length)
        text = self._tokenizer.to_str(pretty=True)
        self._tokenizer.no_truncation()
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Reads what `save` wrote.

        Raises:
          UserError: If the file is missing or is not such a tokenizer.
        """
        import tokenizers

        try:
            text = read_limited(path)
            tokenizer = tokenizers.Tokenizer.from_str(text)
            content = json.loads(text)
            max_length = int(content["truncation"]["max_length"])
            if tokenizer.token_to_id(UNKNOWN) is None:
                raise ValueError(f"it has no {UNKNOWN} word")
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"cannot read the tokenizer {path}: {error}. Expected a tokenizer.json "
                "written by a training run."
            ) from error
        tokenizer.no_truncation()
        pipeline = "words" if tokenizer.token_to_id(UNKNOWN) == 1 else "tutorial"
        return cls(tokenizer, pipeline, max_length, content)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the pipeline, its rules, the length and all words."""
        vocabulary = self._tokenizer.get_vocab()
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        content = json.dumps([self.pipeline, self.max_length, self._rules, words])
        return hashlib.sha256(content.encode()).hexdigest()


def _cut_size(limit: int) -> int:
    """Returns how many characters are likely to hold `limit` tokens."""
    return max(10_000, 16 * limit)


def _most(limit: int | None) -> int:
    """Returns how many characters of a text are ever read."""
    return max(MOST_CHARACTERS, 16 * (limit or 0))


def chunks(texts: Sequence[str], limit: int | None) -> Iterator[list[str]]:
    """Yields texts in lists of bounded size; a text to be cut stands alone."""
    chunk, size = [], 0
    for text in texts:
        text = _well_formed(text[: _most(limit)])
        alone = limit is not None and len(text) > _cut_size(limit)
        full = len(chunk) == CHUNK_TEXTS or size + len(text) > CHUNK_CHARACTERS
        if chunk and (alone or full):
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
        if alone:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _well_formed(text: str) -> str:
    """Replaces lone surrogates, which no UTF-8 text can hold, by question marks."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8")
