"""Runs, small ones: what they leave behind, how they go on, how they end."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import TUTORIAL, Stop, bits, make_config

from flax_lstm import data, epochs, run
from flax_lstm import folder as files
from flax_lstm.config import Config, UserError
from flax_lstm.events import EpochDone, Finished, RunStarted, StepDone
from flax_lstm.finite import NonFiniteLossError
from flax_lstm.history import HistoryWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("compilation_cache"),
]


def test_a_run_folder_holds_all_of_the_run(trained, source):
    result, _ = trained
    names = {p.name for p in result.folder.iterdir()} - {files.LOCK}
    assert names == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "environment.json",
        "summary.json",
        "checkpoints",
    }
    assert Config.load(result.folder / "config.json") == make_config(source)
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["data"]["rows"] == {"train": 64, "validation": 8, "test": 8}
    assert summary["result"]["test"] == result.metrics["test"]
    started = summary["result"]["startup_seconds"]
    parts = [
        summary["result"][f"startup_{part}_seconds"]
        for part in ("import", "data", "compile")
    ]
    assert min(parts) > 0
    assert sum(parts) < started
    waited = [epoch["wait_share"] for epoch in result.metrics["epochs"]]
    assert min(waited) <= summary["result"]["wait_share"] <= max(waited)


def test_events_tell_the_story_in_order(trained):
    _result, events = trained
    kinds = [type(event) for event in events if not isinstance(event, StepDone)]
    assert kinds == [RunStarted, *[EpochDone] * 4, Finished]
    started, middle, finished = events[0], events[1:-1], events[-1]
    assert (started.batches, started.first_epoch, started.epochs) == (4, 1, 4)
    done = [event for event in middle if isinstance(event, EpochDone)]
    assert [e.step for e in done] == [4, 8, 12, 16]
    assert [(e.batch, e.batches) for e in done] == [(4, 4)] * 4
    # Of equal accuracies the lower loss is the better.
    best = max(done, key=lambda e: (e.validation_accuracy, -e.validation_loss))
    assert finished.best_epoch == best.epoch
    assert finished.tested_epoch == finished.best_epoch
    assert all(e.tokens == 64 * 5 for e in done)  # five words in every text
    steps = [event for event in events if isinstance(event, StepDone)]
    assert {s.batch for s in steps} >= {4}


def test_the_words_are_learned(trained, source):
    result, _ = trained
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = result.predict([row["text"] for row in rows])
    right = sum(one.label == row["label"] for one, row in zip(found, rows, strict=True))
    assert right >= 0.95 * len(rows)
    good, bad = result.predict(["a lovely film", "a awful film"])
    assert (good.label, bad.label) == ("good", "bad")
    assert good.score > 0.75 > 0.25 > bad.score


@pytest.mark.parametrize("recipe", [{}, TUTORIAL], ids=["default", "tutorial"])
@pytest.mark.parametrize("place", [EpochDone, StepDone], ids=["between", "within"])
def test_resuming_gives_the_bits_of_the_uninterrupted_run(
    source, tmp_path, recipe, place, straight
):
    """Interrupted after the second epoch, or within the third, then resumed."""
    config = make_config(source, **recipe)
    want = straight(recipe)

    def interrupt(event):
        if isinstance(event, place) and event.epoch == (2 if place is EpochDone else 3):
            raise Stop

    with pytest.raises(Stop):
        run.train(config, tmp_path / "run", on_event=interrupt)
    events = []
    got = run.train(config, tmp_path / "run", resume=True, on_event=events.append)
    assert events[0].first_epoch == 3
    assert bits(got.params) == bits(want.params)
    assert got.metrics["test"] == want.metrics["test"]
    exact = ("epoch", "step", "train_loss", "train_accuracy", "validation_accuracy")
    for one, other in zip(got.metrics["epochs"], want.metrics["epochs"], strict=True):
        assert {n: one[n] for n in exact} == {n: other[n] for n in exact}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_run_that_lost_its_lines_says_so_and_ends_with_the_same_bits(
    source, tmp_path, straight
):
    """The records of two epochs are gone, of which no number depends."""
    config, folder = make_config(source), tmp_path / "run"

    def interrupt(event):
        if isinstance(event, EpochDone) and event.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run.train(config, folder, on_event=interrupt)
    lost = (folder / "metrics.jsonl").read_bytes()[:-20]
    (folder / "metrics.jsonl").write_bytes(lost)
    with pytest.warns(HistoryWarning, match="of epoch 2 knows of"):
        got = run.train(config, folder, resume=True)
    assert bits(got.params) == bits(straight({}).params)
    assert [epoch["epoch"] for epoch in got.metrics["epochs"]] == [3, 4]
    assert (folder / "metrics-damaged-1").read_bytes() == lost
    assert run.Run.load(folder).metrics["test"] == got.metrics["test"]


def test_a_line_that_no_checkpoint_knows_of_is_written_anew(
    source, tmp_path, straight, monkeypatch
):
    """Ended between the line of the second epoch and its checkpoint."""
    folder, save = tmp_path / "run", epochs.Trainer._save

    def end(self, state, progress, *metric):
        if progress.epoch == 2:
            raise Stop
        save(self, state, progress, *metric)

    with monkeypatch.context() as patch:
        patch.setattr(epochs.Trainer, "_save", end)
        with pytest.raises(Stop):
            run.train(make_config(source), folder)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2
    got = run.train(make_config(source), folder, resume=True)
    assert bits(got.params) == bits(straight({}).params)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_checkpoint_does_not_grow_with_the_epochs(trained):
    """Of the last two epochs: a record of one more would be 500 bytes."""
    folder = trained[0].folder / "checkpoints"
    sizes = [p.stat().st_size for p in folder.glob("*/meta/metadata")]
    assert len(sizes) >= 2
    assert max(sizes) - min(sizes) < 200  # digits of floating numbers


def test_every_epoch_has_an_order_of_its_own(source, tmp_path, monkeypatch):
    """The order is a function of (seed, epoch): both must reach the batches."""
    asked, batches = [], epochs.data.batches

    def spy(*args, seed, epoch, **rest):
        if epoch is not None:
            asked.append((seed, epoch))
        return batches(*args, seed=seed, epoch=epoch, **rest)

    monkeypatch.setattr(epochs.data, "batches", spy)
    run.train(make_config(source, epochs=2), tmp_path / "run")
    run.train(make_config(source, epochs=3), tmp_path / "run", resume=True)
    assert asked == [(0, 1), (0, 2), (0, 3)]


def test_texts_become_ids_once_and_not_in_every_epoch(source, tmp_path, monkeypatch):
    """The three parts are encoded one after another; four epochs add nothing."""
    encoded = []

    def spy(self, texts, *rest):
        encoded.append(len(texts))
        return encode_flat(self, texts, *rest)

    encode_flat = data.TextTokenizer.encode_flat
    monkeypatch.setattr(data.TextTokenizer, "encode_flat", spy)
    run.train(make_config(source), tmp_path / "run")
    assert encoded == [64, 8, 8]


def test_a_run_stopped_before_its_first_epoch_can_be_resumed(source, tmp_path, trained):
    def interrupt(event):
        raise Stop

    with pytest.raises(Stop):
        run.train(make_config(source), tmp_path / "run", on_event=interrupt)
    with pytest.warns(run.ResumeWarning, match="starts from the beginning"):
        got = run.train(make_config(source), tmp_path / "run", resume="auto")
    assert bits(got.params) == bits(trained[0].params)


def test_resuming_a_finished_run_can_add_epochs(source, tmp_path):
    config = make_config(source, epochs=1)
    run.train(config, tmp_path / "run")
    more = make_config(source, epochs=2)
    got = run.train(more, tmp_path / "run", resume=True)
    want = run.train(more, tmp_path / "straight")
    assert bits(got.params) == bits(want.params)  # a constant rate knows no total
    assert run.Run.load(tmp_path / "run").config.training.epochs == 2


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resuming_a_run_that_is_done_changes_nothing(
    trained, source, tmp_path, resume, monkeypatch
):
    result, before_events = trained
    folder, events = shutil.copytree(result.folder, tmp_path / "run"), []
    before = contents(folder)
    monkeypatch.setattr(epochs.Trainer, "evaluate", None)
    got = run.train(
        make_config(source, save_every=3),
        folder,
        resume=resume,
        on_event=events.append,
    )
    assert contents(folder) == before
    assert [type(event) for event in events] == [RunStarted, Finished]
    assert events[-1] == dataclasses.replace(before_events[-1], folder=folder)
    assert bits(got.params) == bits(result.params)
    assert got.metrics == result.metrics


def test_a_damaged_summary_is_told_and_is_not_needed_to_go_on(
    trained, source, tmp_path
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    summary = folder / files.SUMMARY
    want = json.loads(summary.read_text())["data"]
    summary.write_text(summary.read_text()[:20])
    with pytest.raises(UserError, match=r"cannot read .*summary.json .* or remove it"):
        run.train(make_config(source), folder, resume=True)
    summary.unlink()
    run.train(make_config(source), folder, resume=True)
    assert json.loads(summary.read_text())["data"] == want


def contents(folder):
    return {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file() and p.name != files.LOCK
    }


def test_a_result_stays_until_there_is_a_new_one(source, tmp_path, monkeypatch):
    """Stopped in the test after one more epoch: the result is of the first alone."""
    folder = tmp_path / "run"
    run.train(make_config(source, epochs=1, test_with="last"), folder)

    def result():
        return json.loads((folder / "summary.json").read_text())["result"]

    first, evaluate = result(), epochs.Trainer.evaluate

    def interrupted(self, state, part):
        if part == "test":
            raise Stop
        return evaluate(self, state, part)

    more = make_config(source, epochs=2, test_with="last")
    with monkeypatch.context() as patch:
        patch.setattr(epochs.Trainer, "evaluate", interrupted)
        with pytest.raises(Stop):
            run.train(more, folder, resume=True)
    assert result() == first
    run.train(more, folder, resume=True)
    assert (result()["epochs_done"], result()["tested_epoch"]) == (2, 2)


def test_a_run_goes_on_where_its_data_has_moved_to(source, tmp_path):
    first = shutil.copy(source, tmp_path / "first.csv")
    folder, second = tmp_path / "run", tmp_path / "second.csv"
    run.train(make_config(first, epochs=1), folder)
    first.rename(second)
    got = run.train(make_config(second, epochs=2), folder, resume=True)
    want = run.train(make_config(source, epochs=2), tmp_path / "straight")
    assert bits(got.params) == bits(want.params)
    assert run.Run.load(folder).evaluate() == want.metrics["test"]
    second.rename(first)
    with open(second, "w", encoding="utf-8") as file:
        file.write(first.read_text().replace("lovely", "likely"))
    with pytest.raises(UserError, match=r"the data has changed since .* source was"):
        run.train(make_config(second, epochs=3), folder, resume=True)


def test_a_run_that_has_not_begun_keeps_to_its_data_too(source, tmp_path):
    def interrupt(event):
        raise Stop

    with pytest.raises(Stop):
        run.train(make_config(source), tmp_path / "run", on_event=interrupt)
    other = tmp_path / "other.csv"
    other.write_text(source.read_text().replace("lovely", "likely"))
    with pytest.raises(UserError, match="the data has changed"):
        run.train(make_config(other), tmp_path / "run", resume="auto")


def test_resuming_what_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume: .*holds no run"):
        run.train(make_config(source), tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="needs the folder"):
        run.train(make_config(source), resume=True)


def test_a_folder_that_holds_a_run_is_left_alone(trained, source):
    folder = trained[0].folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        run.train(make_config(source), folder)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_run_that_lost_its_configuration_is_left_alone(
    trained, source, tmp_path, resume
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    (folder / "config.json").unlink()
    (folder / files.LOCK).unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UserError, match=r"but tokenizer.json, metrics.jsonl, .*move"):
        run.train(make_config(source), folder, resume=resume)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_folder_without_a_name_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="empty name"):
        run.train(make_config(source), "")


HOLD = """
import sys, time
from pathlib import Path
from flax_lstm import folder
with folder.writing(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_of_one_folder_are_kept_apart(source, tmp_path):
    """The second is refused and told who the first is; a dead one holds nothing."""
    target = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=f"being written by process {holder.pid} on"
        ):
            run.train(make_config(source), target)
    finally:
        holder.kill()
        holder.wait()
    with files.writing(target):
        pass


def test_a_folder_that_cannot_be_written_is_refused_at_once(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        run.train(make_config(source), tmp_path / "file" / "run")


def test_bad_data_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError):
        run.train(make_config(tmp_path / "missing.csv"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_infinite_loss_stops_the_run_and_spares_the_checkpoints(
    source, tmp_path, monkeypatch
):
    """The rate is sane in the first epoch, and then so large that numbers overflow."""
    run.train(make_config(source, epochs=1), tmp_path / "run")
    # The recorded rate is edited, which nobody should: a diverging run in one line.
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(': 0.1,\n    "sch', ': 1e30,\n    "sch'))
    monkeypatch.setattr(run, "check_checkpoint", lambda *_: None)
    with pytest.raises(NonFiniteLossError) as caught:
        run.train(
            make_config(source, learning_rate=1e30), tmp_path / "run", resume=True
        )
    message = str(caught.value)
    assert re.search(r"step (6|7|8), with learning rate 1e\+30", message), message
    assert "last good checkpoint is that of step 4" in message
    assert re.search(r"rows (\d+, ){7}\d+ and 8 more of the training part", message)
    path.write_text(path.read_text().replace(": 1e+30", ": 0.1"))
    kept = run.Run.load(tmp_path / "run")
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(kept.params))
    assert len(kept.metrics["epochs"]) == 1


@pytest.mark.parametrize(("test_with", "tested"), [("best", 1), ("last", 3)])
def test_patience_ends_a_run_that_does_not_improve(
    source, tmp_path, monkeypatch, test_with, tested
):
    """Every evaluation says the same, so the first epoch stays the best."""
    monkeypatch.setattr(
        epochs.Trainer, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.5}
    )
    config = make_config(source, patience=2, test_with=test_with)
    got = run.train(config, tmp_path / "run").metrics
    assert len(got["epochs"]) == 3
    assert (got["stopped_early"], got["best_epoch"]) == (True, 1)
    assert got["tested_epoch"] == tested
    assert [epoch["best"] for epoch in got["epochs"]] == [True, False, False]


def test_linen_trains_saves_and_restores_as_well(source, tmp_path):
    config = make_config(source, library="linen", epochs=1)
    result = run.train(config, tmp_path / "run")
    again = run.Run.load(tmp_path / "run")
    assert bits(again.params) == bits(result.params)
    assert again.evaluate() == result.metrics["test"]


@pytest.mark.parametrize("parallel", ["pmap", "sharded"])
def test_many_devices_end_where_one_does(source, tmp_path, straight, parallel):
    """Eight pretend devices, state carried between batches, resumed in the middle."""
    config = make_config(source, parallel=parallel, **TUTORIAL)

    def interrupt(event):
        if isinstance(event, EpochDone) and event.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run.train(config, tmp_path / "run", on_event=interrupt)
    got = run.train(config, tmp_path / "run", resume=True)
    want = straight(TUTORIAL)
    for one, other in zip(
        jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True
    ):
        # Sums over the batch are taken in another order: float32 rounding, 16 steps.
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_folder_is_chosen_where_none_is_given(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "texts-1").mkdir(parents=True)

    def interrupt(event):
        raise Stop

    with pytest.raises(Stop):
        run.train(make_config(source), on_event=interrupt)
    assert (tmp_path / "runs" / "texts-2" / "config.json").exists()
