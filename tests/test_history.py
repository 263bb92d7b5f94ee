"""Records of epochs against the bytes of their file, whole, cut off and changed."""

import hashlib
import json

import pytest

from flax_lstm.history import History, HistoryWarning

RECORDS = [
    {"epoch": 1, "loss": 1 / 3, "seconds": 2.0, "wait_share": 0.5, "skipped": 2},
    {"epoch": 2, "loss": float("inf"), "seconds": 3.0, "wait_share": 0.0, "skipped": 0},
    {"epoch": 3, "loss": None, "seconds": 0.5, "wait_share": 0.0, "name": "é"},
]


def meta_of(history: History) -> dict:
    """Returns the data of a checkpoint, as JSON gives it back."""
    meta = {"progress": {"epoch": len(history.records)}, "history": history.known()}
    return json.loads(json.dumps(meta))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def metas(path):
    """Writes three records, and returns what a checkpoint after each epoch knows."""
    history = History()
    with history.writing(path):
        metas = [meta_of(history)]
        for record in RECORDS:
            history.append(record)
            metas.append(meta_of(history))
            content = path.read_bytes()  # on disk at once, and not at the end
            assert metas[-1]["history"] == {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            assert json.loads(content.splitlines()[-1]) == record
    return metas


@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
def test_a_checkpoint_goes_on_with_the_records_it_knows_of(path, metas, epochs):
    """The lines after them are written anew, to the same bytes."""
    straight = path.read_bytes()
    history = History.read(path, metas[epochs])
    assert history.records == RECORDS[:epochs]
    with history.writing(path):
        assert path.read_bytes() == b"".join(straight.splitlines(True)[:epochs])
        for record in RECORDS[epochs:]:
            history.append(record)
    assert path.read_bytes() == straight
    assert meta_of(history) == metas[3]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-1],
    "a line less": lambda content: b"".join(content.splitlines(True)[1:]),
    "changed": lambda content: content.replace(b"0.333", b"0.334"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_lost_or_changed_file_is_told_of_and_kept(path, metas, damage):
    change = DAMAGE[damage]
    whole = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(whole))
    words = f"{path} does not begin with the {len(whole)} bytes .* of epoch 3 knows of"
    with pytest.warns(HistoryWarning, match=words):
        history = History.read(path, metas[3])
    assert history.records == []
    with history.writing(path):
        history.append({"epoch": 4})
    assert path.read_text() == '{"epoch": 4}\n'
    kept = [p.read_bytes() for p in path.parent.glob("metrics-damaged-*")]
    assert kept == ([] if change is None else [change(whole)])
    assert History.read(path, meta_of(history)).records == [{"epoch": 4}]


def test_an_older_checkpoint_holds_the_records_itself(path):
    meta = {"progress": {"epoch": 3, "history": RECORDS}}
    history = History.read(path, meta)
    with history.writing(path):
        pass
    assert history.records == RECORDS
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS


def test_what_a_checkpoint_knows_does_not_grow():
    """A length and a digest, of a thousand records or of one."""
    sizes = [len(json.dumps(History(RECORDS[:1] * n).known())) for n in (1, 1000)]
    assert sizes[1] - sizes[0] == 3  # digits of the length


def test_the_wait_of_a_run_is_that_of_its_epochs_together():
    """Half of two seconds and none of three: a fifth of five."""
    assert History(RECORDS[:2]).wait_share() == 0.2
    assert History().wait_share() == 0.0
    assert History(RECORDS).skipped() == 2
