"""The batches of an epoch where rows are shared: fixed ones kept, the others anew."""

import numpy as np
from processes import processes

from flax_lstm import data
from flax_lstm.config import DataConfig
from flax_lstm.feeding import Feed
from flax_lstm.sharing import share_of_this_process


def test_rows_are_exchanged_once_where_the_order_is_fixed(tmp_path, monkeypatch):
    """And before each epoch where it is not, though the part is the same."""
    path = tmp_path / "file.csv"
    path.write_text("text,label\n" + "good film,1\nbad film,0\n" * 20)
    config = DataConfig(data=str(path), min_count=1, batch_size=8)
    group = processes(monkeypatch, 2)
    exchanges, exchange = [0, 0], group.exchange

    def counted(given):
        exchanges[group.place()[0]] += 1
        return exchange(given)

    monkeypatch.setattr("flax_lstm.distributed.exchange", counted)
    asked = [("train", None)] * 2 + [("train", 1), ("train", 2)] + [("test", None)] * 2

    def one(process: int):
        corpus = data.load(config, 0, share=share_of_this_process())
        local = slice(4 * process, 4 * process + 4)
        feed = Feed(corpus, corpus.bucket_lengths, config, local)
        return [list(feed.batches(part, seed=0, epoch=epoch)) for part, epoch in asked]

    first, _ = group.run(one)
    assert exchanges == [4, 4]
    labels = [np.concatenate([batch.labels for batch in of]) for of in first]
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])
    assert not np.array_equal(labels[2], labels[3])
