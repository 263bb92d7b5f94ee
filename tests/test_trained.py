"""A trained run, loaded: what it answers, and what it refuses."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_runs import TUTORIAL, make_config

from flax_lstm import run
from flax_lstm.checkpoint import CheckpointWarning
from flax_lstm.config import DataConfig, UserError
from flax_lstm.trained import TrainingDataWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("compilation_cache"),
]


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
    words = r"no longer at .*moving\.csv; .* by --data beside --part validation"
    with pytest.raises(UserError, match=words):
        result.evaluate("validation")
    assert result.predict(["a lovely film"])[0].tokens == ["a", "lovely", "film"]
    # Other data, all of it, is a matter of naming it.
    with pytest.warns(TrainingDataWarning, match="all of it counts here"):
        assert result.evaluate(DataConfig(data=str(source)))["count"] == 80
    with pytest.raises(UserError, match=r"moved_to='a.csv' is for a part"):
        result.evaluate(DataConfig(data=str(source)), "a.csv")


def test_other_data_is_given_by_settings_of_their_types(as_installed, trained, source):
    with pytest.raises(UserError, match=r"data\.min_count must be int; got '2'"):
        trained[0].evaluate(DataConfig(data=str(source), min_count="2"))


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


def test_texts_may_come_from_an_iterator(trained):
    texts = ["a lovely film", "an awful song"]
    found = trained[0].predict(text for text in texts)
    assert found == trained[0].predict(texts)
    assert [one.text for one in found] == texts


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("predict", None, "takes a list of texts, .*; got None"),
        ("predict", [None], r"takes a list of texts, .*; got \[None\]"),
        ("predict", b"good", r"takes a list of texts, .*; got \["),
        ("trace", None, "takes one text, .*; got None"),
        ("trace", ["a"], r"takes one text, .*; got \['a'\]"),
        ("load", None, "takes the folder of a run; got None"),
        ("load", "", "takes the folder of a run; got ''"),
    ],
)
def test_what_is_no_text_and_no_folder_is_refused(
    as_installed, trained, method, given, words
):
    with pytest.raises(UserError, match=f"{method} {words}"):
        getattr(trained[0], method)(given)


@pytest.mark.parametrize("recipe", [{}, TUTORIAL], ids=["default", "tutorial"])
def test_the_last_score_of_a_trace_is_the_prediction(straight, recipe):
    result = straight(recipe)
    text = "a lovely film awful"
    steps = result.trace(text)
    assert [word for word, _ in steps] == text.split()
    assert steps[-1][1] == pytest.approx(result.predict([text])[0].score, abs=1e-6)
    assert result.trace("") == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(source, tmp_path):
    config = make_config(source, epochs=3, test_with="last")
    run.train(config, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12" / "state"
    path = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()))
    with (
        pytest.warns(CheckpointWarning, match="/12 is damaged"),
        pytest.warns(CheckpointWarning, match="not that of epoch 3, which was tested"),
    ):
        result = run.Run.load(tmp_path / "run")
    assert [epoch["epoch"] for epoch in result.metrics["epochs"]] == [1, 2]


def test_it_is_told_that_the_tested_checkpoint_is_gone(trained, tmp_path):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    tested = trained[0].metrics["tested_epoch"]
    shutil.rmtree(folder / "checkpoints" / str(4 * tested))  # four batches an epoch
    used = max(steps - {4 * tested}) // 4
    words = f"of epoch {used} of .* is used, not that of epoch {tested}, which was"
    with pytest.warns(CheckpointWarning, match=words):
        run.Run.load(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.json", "summary.json"])
def test_what_of_a_run_cannot_be_read_is_told(trained, tmp_path, name):
    """A folder in its place, which root cannot read either."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError, match=rf"cannot read .*{name}.* Is a directory"):
        run.Run.load(folder)


def forbid(monkeypatch, name):
    """Lets no folder of this name be read, as for anybody but root."""
    listed = pathlib.Path.iterdir

    def iterdir(self):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)


def test_checkpoints_that_cannot_be_read_are_told(
    trained, source, tmp_path, monkeypatch
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    forbid(monkeypatch, "checkpoints")
    words = "cannot read .*/checkpoints of the run: Permission denied"
    with pytest.raises(UserError, match=words):
        run.Run.load(folder)
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, epochs=5), folder, resume=True)


def test_a_swapped_tokenizer_is_noticed(trained, tmp_path):
    copy = shutil.copytree(trained[0].folder, tmp_path / "copy")
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("lovely", "lovelier"))
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer"):
        run.Run.load(copy)


def test_loading_before_training_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no run .*flax-lstm train"):
        run.Run.load(tmp_path / "nothing")
