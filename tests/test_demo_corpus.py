"""Counting words fails where order decides, and the corpus is always the same."""

import hashlib
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from flax_lstm.demo_corpus import KINDS, sentences

UNLIKE = {"plain", "bare negation", "crossed"}
"""Kinds in which a sentence and its counterpart do not hold the same words."""


def test_the_corpus_is_the_same_everywhere():
    """Written down once; `random.random` is promised not to change."""
    text = "\n".join(f"{s.label} {s.kind} {s.text}" for s in sentences())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d9a686453eea52d4"


def test_sentences_are_distinct_and_labels_balanced_in_every_kind():
    found = sentences()
    assert len(found) == len({s.text for s in found}) == 4000
    counts = Counter((s.kind, s.label) for s in found)
    assert set(counts) == {(kind, label) for kind in KINDS for label in (0, 1)}
    assert all(counts[kind, 0] == counts[kind, 1] for kind in KINDS)
    assert counts["plain", 0] == 600


def test_every_ordered_sentence_has_its_counterpart_of_the_same_words():
    bags = {0: Counter(), 1: Counter()}
    for sentence in sentences():
        if sentence.kind not in UNLIKE:
            bags[sentence.label][" ".join(sorted(sentence.text.split()))] += 1
    assert bags[0] == bags[1]


def test_another_seed_or_size_gives_another_corpus():
    assert 390 <= len(sentences(400)) <= 400
    assert sentences(400, seed=1) != sentences(400, seed=2)


@pytest.mark.parametrize("kind", [*sorted(UNLIKE), "all the other kinds"])
def test_a_bag_of_words_learns_the_plain_part_alone(kind):
    """Tested on fresh sentences, in which a counterpart is never in training alone.

    For words in another order chance is exact; the standard error of `crossed` is
    0.025, from 400 sentences. A bare negation is the opposite of what its word says.
    """
    train, test = sentences(seed=0), sentences(seed=1)
    vectorizer = CountVectorizer(token_pattern=r"\S+")
    model = LogisticRegression(C=1.0, max_iter=1000)
    counts = vectorizer.fit_transform([s.text for s in train])
    model.fit(counts, [s.label for s in train])
    others = set(KINDS) - UNLIKE
    part = [s for s in test if s.kind in ({kind} & set(KINDS) or others)]
    accuracy = model.score(
        vectorizer.transform([s.text for s in part]), [s.label for s in part]
    )
    if kind == "plain":
        assert accuracy > 0.98
    elif kind == "crossed":
        assert abs(accuracy - 0.5) < 0.07
    elif kind == "bare negation":
        assert accuracy < 0.5
    else:
        assert accuracy == 0.5
