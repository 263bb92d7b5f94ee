"""Which words a vocabulary has, and their ids: against counts made by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np

from flax_lstm.config import TUTORIAL, DataConfig
from flax_lstm.vocabulary import fit

WORDS = DataConfig(min_count=1)


def test_ids_fall_with_frequency_and_ties_go_to_the_first_seen():
    texts = ["b a a c", "c d b zzz", "e"]
    want = ["b", "a", "c", "d", "zzz", "e"]  # twice each: b a c; once: d zzz e
    tokenizer, ids, offsets = fit(texts, WORDS)
    assert tokenizer.vocabulary_size == 2 + len(want)
    assert [tokenizer.encode([word])[0].tolist() for word in want] == [
        [2 + i] for i in range(len(want))
    ]
    for text, a, b in zip(texts, offsets[:-1], offsets[1:], strict=True):
        assert np.array_equal(ids[a:b], tokenizer.encode([text])[0])
    tutorial, ids, _ = fit(texts, TUTORIAL.data)
    assert tutorial.encode(want and [" ".join(want)])[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert ids.tolist() == [1, 2, 2, 3, 3, 4, 1, 5, 6]


def test_rare_words_and_words_beyond_the_size_become_the_unknown_word():
    texts = ["a a a b b b c c d"]
    tokenizer, ids, _ = fit(texts, DataConfig(min_count=2, vocabulary_size=2))
    assert tokenizer.vocabulary_size == 4
    assert ids.tolist() == [2, 2, 2, 3, 3, 3, 1, 1, 1]
    assert (tokenizer.count_unknown(ids), len(ids)) == (3, 9)


def test_only_tokens_that_are_kept_count_for_the_vocabulary():
    tokenizer, _, _ = fit(["a b c c c"], replace(WORDS, max_length=2))
    assert tokenizer.vocabulary_size == 2 + 2


def test_counts_of_a_corpus_match_a_counter():
    rng = np.random.default_rng(0)
    texts = [
        " ".join(f"w{n}" for n in rng.zipf(1.5, 30) if n < 1000) for _ in range(50)
    ]
    tokenizer, ids, _ = fit(texts, WORDS)
    want = Counter(word for text in texts for word in text.split())
    got = np.bincount(ids)
    for word, count in want.items():
        assert got[tokenizer.encode([word])[0][0]] == count
