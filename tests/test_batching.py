"""Batches hold every row once, padded as asked, in an order that (seed, epoch) give."""

import itertools
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_lstm import batching
from flax_lstm.batching import (
    batch_count,
    batch_plan,
    batches,
    padded_lengths,
    permutation,
    prefetch,
)
from flax_lstm.config import DataConfig, UserError
from flax_lstm.examples import Examples

CONFIG = DataConfig(batch_size=8, buckets=4, max_length=50)


@pytest.fixture(autouse=True)
def free_compiling(monkeypatch):
    """So that the few rows of these tests have several bucket lengths."""
    monkeypatch.setattr(batching, "COMPILE_STEPS", 0)


def make_examples(rows=203, longest=40, seed=0):
    """Rows of random length whose ids spell out row and position, some empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, rows)
    lengths[0] = longest
    ids = [1000 * row + 1 + np.arange(n) for row, n in enumerate(lengths)]
    return Examples.from_rows(ids, rng.integers(0, 2, rows).astype(np.float32))


def rows_of(batch, examples):
    """Reads the real rows out of a batch by a loop, and checks each one's padding."""
    found = []
    for tokens, length, label, weight in zip(*batch, strict=True):
        if not weight:
            assert not tokens.any()
            assert (length, label) == (0, 0)
            continue
        assert not tokens[length:].any()
        found.append((tuple(tokens[:length].tolist()), float(label)))
    return found


def everything(examples):
    return sorted(
        (tuple(ids.tolist()), label)
        for ids, label in (examples[row] for row in range(len(examples)))
    )


@pytest.mark.parametrize("epoch", [None, 0, 5])
def test_an_epoch_holds_every_row_exactly_once(epoch):
    examples = make_examples()
    lengths = padded_lengths(examples, CONFIG)
    found, shapes = [], set()
    for batch in batches(examples, lengths, CONFIG, seed=3, epoch=epoch):
        found += rows_of(batch, examples)
        shapes.add(batch.tokens.shape)
    assert sorted(found) == everything(examples)
    assert shapes == {(CONFIG.batch_size, n) for n in lengths}
    assert len(lengths) <= CONFIG.buckets


def test_the_order_depends_on_seed_and_epoch_alone():
    examples = make_examples()
    lengths = padded_lengths(examples, CONFIG)

    def order(seed, epoch):
        plan = batch_plan(examples, lengths, CONFIG, seed=seed, epoch=epoch)
        return np.concatenate([rows for _, rows in plan]).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*key)) for key in [(1, 2), (2, 1), (1, 3), (2, 2)]}) == 4
    assert order(1, None) == order(2, None)

    def companies(epoch):
        plan = batch_plan(examples, lengths, CONFIG, seed=1, epoch=epoch)
        return {frozenset(rows.tolist()) for _, rows in plan}

    assert companies(2) != companies(3)  # rows meet others in another epoch


def test_permutation_is_the_same_on_every_version():
    """NumPy promises Philox's stream: these values were written down once."""
    assert permutation(8, 0, 7).tolist() == [6, 0, 5, 2, 1, 3, 7, 4]
    assert sorted(permutation(100, 5).tolist()) == list(range(100))


def test_start_resumes_where_an_epoch_was_left():
    examples = make_examples()
    lengths = padded_lengths(examples, CONFIG)
    arguments = (examples, lengths, CONFIG)
    whole = list(batches(*arguments, seed=1, epoch=4))
    rest = list(batches(*arguments, seed=1, epoch=4, start=9))
    assert len(whole) == batch_count(*arguments) == 9 + len(rest)
    for a, b in zip(whole[9:], rest, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="start must be 0 to"):
        next(batches(*arguments, seed=1, epoch=4, start=len(whole) + 1))


def brute_force(lengths, config):
    """The least number of computed steps over all choices of bucket lengths."""
    candidates = sorted({min(-(-max(n, 1) // 4) * 4, 50) for n in lengths})
    best = np.inf
    for count in range(1, config.buckets + 1):
        for chosen in itertools.combinations(candidates[:-1], count - 1):
            edges, steps = [*chosen, candidates[-1]], 0
            bucket = np.searchsorted(edges, lengths)
            for edge, rows in zip(
                edges, np.bincount(bucket, minlength=len(edges)), strict=True
            ):
                steps += -(-rows // config.batch_size) * config.batch_size * edge
            best = min(best, steps)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_bucket_lengths_compute_the_least_padding(seed):
    """Within the 2 % that fewer buckets are allowed to cost."""
    examples = make_examples(rows=150, seed=seed)
    lengths = padded_lengths(examples, CONFIG)
    steps = sum(
        b.tokens.size for b in batches(examples, lengths, CONFIG, seed=0, epoch=0)
    )
    least = brute_force(examples.lengths.tolist(), CONFIG)
    assert least <= steps <= 1.02 * least


@pytest.mark.parametrize(("rows", "lengths"), [(1000, (40,)), (1200, (4, 40))])
def test_a_length_is_compiled_where_it_saves_more_than_it_costs(
    monkeypatch, rows, lengths
):
    """A second one saves half the rows 36 steps and costs 20,000: from 1112 rows on."""
    monkeypatch.setattr(batching, "COMPILE_STEPS", 20_000)
    texts = [np.ones(n, np.int32) for n in [4, 40] * (rows // 2)]
    examples = Examples.from_rows(texts, np.zeros(rows))
    config = replace(CONFIG, batch_size=10, buckets=8)
    assert padded_lengths(examples, config) == lengths


def test_rows_longer_than_any_in_training_get_one_more_shape():
    lengths = padded_lengths(make_examples(longest=20), CONFIG)
    longer = make_examples(longest=37, seed=1)
    found = list(batches(longer, lengths, CONFIG, seed=0, epoch=None))
    assert sorted(itertools.chain(*(rows_of(b, longer) for b in found))) == everything(
        longer
    )
    assert {b.tokens.shape[1] for b in found} <= {*lengths, CONFIG.max_length}


def test_the_tutorial_pads_left_keeps_order_and_drops_the_remainder():
    config = replace(CONFIG, pipeline="tutorial", max_length=40)
    examples = make_examples()
    lengths = padded_lengths(examples, config)
    assert lengths == (40,)
    found = list(batches(examples, lengths, config, seed=0, epoch=6))
    assert len(found) == len(examples) // 8 == batch_count(examples, lengths, config)
    for number, batch in enumerate(found):
        assert batch.lengths is None
        assert batch.weights.all()
        for i, row in enumerate(range(8 * number, 8 * number + 8)):
            ids, label = examples[row]
            want = np.concatenate([np.zeros(40 - len(ids)), ids])
            assert np.array_equal(batch.tokens[i], want)
            assert batch.labels[i] == label
    exact = list(batches(examples, lengths, config, seed=0, epoch=None))
    assert sum(b.weights.sum() for b in exact) == len(examples)
    dropped = batches(
        examples, lengths, config, seed=0, epoch=None, drop_remainder=True
    )
    assert len(list(dropped)) == len(found)


def test_a_training_part_smaller_than_a_batch_is_refused_where_it_would_be_dropped():
    config = replace(CONFIG, pipeline="tutorial")
    with pytest.raises(UserError, match="5 rows, fewer than the batch size 8"):
        batch_count(make_examples(rows=5), (50,), config)


def test_no_rows_are_no_batches():
    empty = Examples.from_rows([], [])
    lengths = padded_lengths(empty, CONFIG)
    assert list(batches(empty, lengths, CONFIG, seed=0, epoch=None)) == []


def test_a_very_long_text_does_not_blow_up_the_choice_of_lengths():
    config = replace(CONFIG, max_length=5_000_000)
    rows = [np.ones(n, np.int32) for n in [*range(3000), 4_999_999]]
    lengths = padded_lengths(Examples.from_rows(rows, np.zeros(3001)), config)
    assert lengths[-1] >= 4_999_999
    assert len(lengths) <= config.buckets


def test_prefetch_places_items_on_the_device_in_order():
    examples = make_examples()
    plain = list(batches(examples, (40,), CONFIG, seed=0, epoch=0))
    ahead = list(prefetch(iter(plain)))
    for a, b in zip(plain, ahead, strict=True):
        assert isinstance(b.tokens, jax.Array)
        assert np.array_equal(a.tokens, np.asarray(b.tokens))


def test_prefetch_works_ahead_but_no_more_than_asked():
    taken = []
    stream = prefetch(
        (taken.append(i) or i for i in range(100)), size=3, place=lambda item: item
    )
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) == 5  # one used, three waiting, one in hand
    stream.close()


def test_prefetch_raises_the_error_of_its_source_and_ends_its_thread():
    def source():
        yield np.zeros(2)
        raise OSError("the disk is gone")

    stream = prefetch(source())
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    stream = prefetch(iter([np.zeros(1)] * 50))
    next(stream)
    stream.close()
    assert not any(t.name == "prefetch" for t in threading.enumerate())
