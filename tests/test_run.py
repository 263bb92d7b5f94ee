"""Runs, small ones: what they leave behind, how they go on, how they end."""

import csv
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flax_lstm import epochs, run
from flax_lstm import folder as files
from flax_lstm.checkpoint import CheckpointWarning
from flax_lstm.config import Config, DataConfig, ModelConfig, TrainConfig, UserError
from flax_lstm.events import EpochDone, Finished, RunStarted, StepDone
from flax_lstm.train import NonFiniteLossError

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Most runs here compile the same programs: 7 s of CPU each, 1 s with the cache."""
    before = jax.config.values.get("jax_compilation_cache_dir")
    run.use_compilation_cache(tmp_path_factory.mktemp("xla"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Eighty short texts, of which a word tells the label."""
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rng = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(80):
            words = rng.choices(["film", "plot", "cast", "song", "a", "the"], k=4)
            words.insert(n % 5, ["awful", "lovely"][n % 2])
            writer.writerow([" ".join(words), ["bad", "good"][n % 2]])
    return path


def make_config(source: Path, **changes) -> Config:
    """A tiny model on the tiny data; `changes` go to whichever section has them."""
    values = {
        "data": dict(data=str(source), batch_size=16, buckets=1, max_length=8),
        "model": dict(
            embedding_size=4, embedding_scale=0.5, features=(5,), dropout=0.1
        ),
        # A constant rate, so that runs of any length share a compiled program.
        "training": dict(
            epochs=4,
            learning_rate=0.1,
            schedule="constant",
            warmup_fraction=0.0,
            patience=None,
        ),
    }
    kinds = {"data": DataConfig, "model": ModelConfig, "training": TrainConfig}
    for name, value in changes.items():
        for section, kind in kinds.items():
            if name in {field.name for field in dataclasses.fields(kind)}:
                values[section][name] = value
    return Config(**{s: kind(**values[s]) for s, kind in kinds.items()})


TUTORIAL = dict(
    pipeline="tutorial",
    carry_state=True,
    pooling="last",
    optimizer="adadelta",
    schedule="cosine",  # not the tutorial's, but it must be resumed in its middle
    test_with="last",
)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A finished run with everything it said."""
    events = []
    folder = tmp_path_factory.mktemp("runs") / "done"
    result = run.train(make_config(source), folder, on_event=events.append)
    return result, events


def bits(params) -> list[bytes]:
    return [np.asarray(p).tobytes() for p in jax.tree.leaves(params)]


class Stop(Exception):
    """Stands for whatever ends a process."""


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


def test_events_tell_the_story_in_order(trained):
    _result, events = trained
    kinds = [type(event) for event in events if not isinstance(event, StepDone)]
    assert kinds == [RunStarted, *[EpochDone] * 4, Finished]
    started, middle, finished = events[0], events[1:-1], events[-1]
    assert (started.batches, started.first_epoch, started.epochs) == (4, 1, 4)
    done = [event for event in middle if isinstance(event, EpochDone)]
    assert [e.step for e in done] == [4, 8, 12, 16]
    assert [(e.batch, e.batches) for e in done] == [(4, 4)] * 4
    accuracies = [e.validation_accuracy for e in done]
    assert finished.best_epoch == 1 + int(np.argmax(accuracies))
    assert finished.tested_epoch == finished.best_epoch
    assert all(e.tokens == 64 * 5 for e in done)  # five words in every text
    steps = [event for event in events if isinstance(event, StepDone)]
    assert {s.batch for s in steps} >= {4}


def test_the_words_are_learned(trained):
    result, _ = trained
    assert result.metrics["test"]["accuracy"] == 1.0
    good, bad = result.predict(["a lovely film", "a awful film"])
    assert (good.label, bad.label) == ("good", "bad")
    assert good.score > 0.75 > 0.25 > bad.score


FRESH = """
import json, sys
from flax_lstm.run import Run
run = Run.load(sys.argv[1])
scores = [p.score for p in run.predict(["a lovely film", "", "an awful song"])]
print(json.dumps({"test": run.evaluate(), "scores": scores}))
"""


def test_a_fresh_process_reproduces_a_copied_run(trained, tmp_path):
    result, _ = trained
    copy = shutil.copytree(result.folder, tmp_path / "élan vital")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(copy)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    here = result.predict(["a lovely film", "", "an awful song"])
    assert got["test"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert got["test"]["count"] == 8
    np.testing.assert_allclose(got["scores"], [p.score for p in here], atol=1e-6)


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


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory, trained):
    done = {}

    def train(recipe):
        if not recipe:
            return trained[0]
        name = str(sorted(recipe))
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / "straight"
            done[name] = run.train(make_config(source, **recipe), folder)
        return done[name]

    return train


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


def test_a_run_stopped_before_its_first_epoch_can_be_resumed(source, tmp_path, trained):
    def interrupt(event):
        raise Stop

    with pytest.raises(Stop):
        run.train(make_config(source), tmp_path / "run", on_event=interrupt)
    got = run.train(make_config(source), tmp_path / "run", resume=True)
    assert bits(got.params) == bits(trained[0].params)


def test_resuming_a_finished_run_can_add_epochs(source, tmp_path):
    config = make_config(source, epochs=1)
    run.train(config, tmp_path / "run")
    more = make_config(source, epochs=2)
    got = run.train(more, tmp_path / "run", resume=True)
    want = run.train(more, tmp_path / "straight")
    assert bits(got.params) == bits(want.params)  # a constant rate knows no total
    assert run.Run.load(tmp_path / "run").config.training.epochs == 2


def test_resuming_what_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume: .*holds no run"):
        run.train(make_config(source), tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="needs the folder"):
        run.train(make_config(source), resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": (6,)}, r"model.features = \(5,\).*go on with \(6,\)"),
        ({"batch_size": 8}, r"data.batch_size = 16.*go on with 8"),
        ({"epochs": 3}, r"training.epochs = 4.*go on with 3; epochs can only grow"),
    ],
    ids=["model", "data", "fewer epochs"],
)
def test_resuming_with_other_settings_names_them(trained, source, changes, words):
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, **changes), trained[0].folder, resume=True)


def test_resuming_on_changed_data_is_refused(source, tmp_path):
    moving = shutil.copy(source, tmp_path / "moving.csv")
    config = make_config(moving, epochs=1)
    run.train(config, tmp_path / "run")
    with open(moving, "a", encoding="utf-8") as file:
        file.write("a fine film,good\n")
    more = make_config(moving, epochs=2)
    with pytest.raises(UserError, match="the data has changed"):
        run.train(more, tmp_path / "run", resume=True)
    result = run.Run.load(tmp_path / "run")
    with pytest.raises(UserError, match="the data has changed"):
        result.evaluate()
    moving.unlink()
    with pytest.raises(UserError, match=r"moving\.csv"):
        result.evaluate()
    assert result.predict(["a lovely film"])[0].tokens == ["a", "lovely", "film"]
    # Other data, all of it, is a matter of naming it.
    assert result.evaluate(DataConfig(data=str(source)))["count"] == 80


def test_a_folder_that_holds_a_run_is_left_alone(trained, source):
    folder = trained[0].folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        run.train(make_config(source), folder)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert after == before


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


def test_an_infinite_loss_stops_the_run_and_spares_the_checkpoints(source, tmp_path):
    """The rate is sane in the first epoch, and then so large that numbers overflow."""
    run.train(make_config(source, epochs=1), tmp_path / "run")
    # The recorded rate is edited, which nobody should: a diverging run in one line.
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(': 0.1,\n    "sch', ': 1e30,\n    "sch'))
    with pytest.raises(NonFiniteLossError) as caught:
        run.train(
            make_config(source, learning_rate=1e30), tmp_path / "run", resume=True
        )
    message = str(caught.value)
    assert re.search(r"step (6|7|8), with learning rate 1e\+30", message), message
    assert "last good checkpoint is that of step 4" in message
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


def test_predictions_come_in_the_order_of_the_texts(trained):
    result, _ = trained
    texts = ["a lovely film", "", "awful " * 50, "zzz film"] * 5 + ["the plot"]
    together = result.predict(texts)
    assert [p.text for p in together] == texts
    alone = [result.predict([text])[0] for text in [*texts[:4], "the plot"]]
    scores = {p.text: p.score for p in alone}
    assert len({round(score, 4) for score in scores.values()}) == 5
    # One compiled program for each batch size: sums may round differently.
    np.testing.assert_allclose(
        [p.score for p in together], [scores[text] for text in texts], atol=1e-6
    )
    assert [len(p.tokens) for p in alone] == [3, 0, 8, 2, 2]
    assert [p.unknown for p in alone] == [0, 0, 0, 1, 0]
    assert {p.label for p in together} <= {"bad", "good"}
    assert result.predict([]) == []
    with pytest.raises(UserError, match="list of texts"):
        result.predict("a lovely film")


@pytest.mark.parametrize("recipe", [{}, TUTORIAL], ids=["default", "tutorial"])
def test_the_last_score_of_a_trace_is_the_prediction(straight, recipe):
    result = straight(recipe)
    text = "a lovely film awful"
    steps = result.trace(text)
    assert [word for word, _ in steps] == text.split()
    assert steps[-1][1] == pytest.approx(result.predict([text])[0].score, abs=1e-6)
    assert result.trace("") == []


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


def test_a_damaged_checkpoint_gives_way_to_the_one_before(source, tmp_path):
    config = make_config(source, epochs=3, test_with="last")
    run.train(config, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12" / "state"
    path = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()))
    with pytest.warns(CheckpointWarning, match="/12 is damaged"):
        result = run.Run.load(tmp_path / "run")
    assert [epoch["epoch"] for epoch in result.metrics["epochs"]] == [1, 2]


def test_a_swapped_tokenizer_is_noticed(trained, tmp_path):
    copy = shutil.copytree(trained[0].folder, tmp_path / "copy")
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("lovely", "lovelier"))
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer"):
        run.Run.load(copy)


def test_loading_before_training_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no run .*flax-lstm train"):
        run.Run.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "training.epochs must be at least 1; got 0"),
        ({"features": ()}, "model.features must be at least 1; got 0"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and below 1; got 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be .* got nan"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
    ],
)
def test_settings_out_of_range_are_refused(source, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_is_chosen_where_none_is_given(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "texts-1").mkdir(parents=True)

    def interrupt(event):
        raise Stop

    with pytest.raises(Stop):
        run.train(make_config(source), on_event=interrupt)
    assert (tmp_path / "runs" / "texts-2" / "config.json").exists()
