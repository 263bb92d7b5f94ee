"""Rows that several processes hold: what is handed over, and who may ask for what."""

import numpy as np
from processes import processes

from flax_lstm.batching import PlannedBatch
from flax_lstm.examples import Examples
from flax_lstm.shared_rows import SharedRows, fed_batches, feed

TEXTS = [[1], [], [2, 3, 4], [5, 6], [7], [8, 9], [], [10, 11, 12]]
HOLDERS = [0, 2, 0, 2, 2, 0, 0, 2]
"""Process 1 holds nothing."""


def shared(process: int) -> SharedRows:
    whole = Examples.from_rows([np.array(t, np.int32) for t in TEXTS], np.arange(8) % 2)
    holders = np.array(HOLDERS)
    held = whole.take(np.flatnonzero(holders == process))
    return SharedRows(whole.lengths, whole.labels, holders, process, held)


def test_each_gets_the_rows_it_wants_in_its_order(monkeypatch):
    """Twice the same row, one's own, none at all."""
    wanted = [np.array([7, 0, 3, 7]), np.zeros(0, int), np.array([6, 5, 4, 3, 2, 1])]
    found = processes(monkeypatch, 3).run(lambda k: shared(k).exchange(wanted))
    for rows, got in zip(wanted, found, strict=True):
        assert [got[n][0].tolist() for n in range(len(got))] == [TEXTS[r] for r in rows]
        assert got.labels.tolist() == (rows % 2).tolist()


def test_nothing_else_is_handed_over(monkeypatch):
    """As many ids as are wanted of what another holds, or oneself."""
    given = []
    group = processes(monkeypatch, 3)
    exchange = group.exchange

    def counted(parts):
        given.append(sum(map(len, parts)))
        return exchange(parts)

    monkeypatch.setattr("flax_lstm.distributed.exchange", counted)
    plan = [PlannedBatch(4, np.array([5, 2, 7, 0, 1, 3]))]
    group.run(lambda k: feed(shared(k), plan, slice(2 * k, 2 * k + 2)))
    assert sum(given) == sum(len(TEXTS[row]) for row in plan[0].rows)


def test_short_batches_are_filled_up(monkeypatch):
    """The last batch has three rows for three processes of two: one has a filler."""
    plan = [PlannedBatch(3, np.array([0, 1, 2, 3, 4])), PlannedBatch(2, np.array([5]))]

    def one(process: int):
        local = slice(2 * process, 2 * process + 2)
        fed = feed(shared(process), plan, local)
        return list(fed_batches(fed, plan, local, left=False))

    first, second = zip(*processes(monkeypatch, 3).run(one), strict=True)
    assert [b.weights.tolist() for b in first] == [[1, 1], [1, 1], [1, 0]]
    assert [b.weights.tolist() for b in second] == [[1, 0], [0, 0], [0, 0]]
    assert [b.tokens.tolist() for b in first] == [
        [[1, 0, 0], [0, 0, 0]],
        [[2, 3, 4], [5, 6, 0]],
        [[7, 0, 0], [0, 0, 0]],
    ]
    assert second[0].tokens.tolist() == [[8, 9], [0, 0]]
