"""The words of a corpus counted, and the tokenizer that is made of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64

from flax_lstm.config import DataConfig
from flax_lstm.sharing import ALONE, Share
from flax_lstm.text import PAD, UNKNOWN, TextTokenizer, chunks
from flax_lstm.word_counts import WordCounts, add_up, count

if TYPE_CHECKING:  # imported where used, so that training runs without it
    import tokenizers

WORD = r"[$#@]?\w+(?:'\w+)*|[^\w\s\p{Cc}\p{Cf}]"
NUMBER = r"\d*\.?\d+"
TAGS = ("TICKER", "USER", "LINK", "PRICE", "NUMBER")


def fit(
    texts: Sequence[str],
    config: DataConfig,
    *,
    share: Share = ALONE,
    rows: Int64[np.ndarray, "texts"] | None = None,
) -> tuple[TextTokenizer, Int32[np.ndarray, "N"], Int64[np.ndarray, "ends"]]:
    """Builds the vocabulary from `texts` and encodes them with it.

    `words` counts the tokens that are kept of each text, `tutorial` counts all of
    them and keeps every word.

    Args:
      texts: The texts, or the stretch of them that is this process'.
      config: The pipeline and the bounds of its vocabulary.
      share: Who has the other texts. Their counts are added up, so that the vocabulary
        is that of all texts; all must call this.
      rows: The place of each text among all of them; their order when None.

    Returns:
      The tokenizer, and the ids and offsets as of `TextTokenizer.encode_flat`, the
      rows not yet cut to `max_length`.
    """
    with share.together():
        found, raw, offsets = _encode_with_every_word(texts, config)
        bound = None if config.pipeline == "tutorial" else config.max_length
        mine = count(found, raw, offsets, bound, rows)
    counted = [mine]
    if not share.whole:
        said = share.gather(mine.to_json())
        counted = [WordCounts.from_json(*one) for one in said]
    with share.together():
        tokenizer = _build(add_up(counted), config)
        new = tokenizer.ids()
        unknown = new[UNKNOWN]
        table = [new.get(word, unknown) for word in [*found, UNKNOWN]]
        return tokenizer, np.array(table, np.int32)[raw], offsets


def _encode_with_every_word(
    texts: Sequence[str], config: DataConfig
) -> tuple[list[str], Int32[np.ndarray, "N"], Int64[np.ndarray, "ends"]]:
    """Returns all words of some texts, and their ids in that list, as `encode_flat`.

    The id behind the last one is that of a word through which a long text was cut.
    """
    from tokenizers import Tokenizer, models, trainers

    every = Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    _set_pipeline(every, config.pipeline)
    # First all words, in any order: ids to count with, at compiled speed.
    trainer = trainers.WordLevelTrainer(
        vocab_size=2**31, min_frequency=0, special_tokens=[], show_progress=False
    )
    every.train_from_iterator(chunks(texts, None), trainer)
    vocabulary = every.get_vocab()
    found = sorted(vocabulary, key=vocabulary.__getitem__)
    # A cut through a long text can make half a word, which is in no vocabulary.
    vocabulary[UNKNOWN] = len(found)
    every.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    counter = TextTokenizer(every, config.pipeline, config.max_length, rules={})
    limit = None if config.pipeline == "tutorial" else config.max_length
    return found, *counter.encode_flat(texts, limit)


def _build(counted: WordCounts, config: DataConfig) -> TextTokenizer:
    """Builds the tokenizer of the words that occur often enough."""
    from tokenizers import Tokenizer, models

    words, counts, first = counted
    tutorial = config.pipeline == "tutorial"
    order = np.lexsort((first, -counts))
    least = 1 if tutorial else max(1, config.min_count)
    order = order[counts[order] >= least]
    if tutorial:
        names = [PAD, *(words[i] for i in order), UNKNOWN]
    else:
        names = [PAD, UNKNOWN, *(words[i] for i in order[: config.vocabulary_size])]
    new = {word: i for i, word in enumerate(names)}
    final = Tokenizer(models.WordLevel(new, unk_token=UNKNOWN))
    _set_pipeline(final, config.pipeline)
    return TextTokenizer(final, config.pipeline, config.max_length)


def _set_pipeline(tokenizer: "tokenizers.Tokenizer", pipeline: str) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    def replace(pattern: str, by: str) -> normalizers.Normalizer:
        return normalizers.Replace(Regex(pattern), by)

    if pipeline == "words":
        steps = [
            replace(r"<br\s*/?>", " "),
            replace("[\u2019\u0092]", "'"),  # the second is cp1252's, read as latin-1
            normalizers.Lowercase(),
        ]
        splitter = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    else:
        tags = "|".join(TAGS)
        ends = "|".join(f"<{tag}" for tag in TAGS)
        # Upper case marks the tags from here on: the text has none left.
        steps = [
            normalizers.Lowercase(),
            replace(r"\$[a-z]+", " <TICKER> "),
            replace(r"@\w+", " <USER> "),
            replace(r"https?://\S+", " <LINK> "),
            replace(rf"\$(?!{NUMBER}%){NUMBER}|(?!{NUMBER}%){NUMBER}\$", " <PRICE> "),
            replace(rf"(?!{NUMBER}[%k]){NUMBER}", " <NUMBER> "),
            replace(r"[-+]?[0-9]+", " <NUMBER> "),
            replace(r"&\w+", ""),
            replace(r"[^\x00-\x7f]", ""),
            replace(r"[!-/:;=?@\[-`{-~]", ""),
            replace(rf"<(?!(?:{tags})>)", ""),
            replace(rf"(?<!{ends})>", ""),
        ]
        splitter = pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = splitter
