"""`evaluate`, `predict` and `trace` of the command line."""

import json

import numpy as np
import pytest
from command_lines import error_of, program
from small_runs import make_config

from flax_lstm import cli, run

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("command", ["evaluate", "predict", "trace"])
def test_a_folder_without_a_run_is_an_error(capsys, tmp_path, command):
    argv = [command, str(tmp_path), *(["a text"] if command != "evaluate" else [])]
    assert "holds no run" in error_of(capsys, *argv)


def test_texts_and_a_file_together_are_refused(capsys, demo_folder, tmp_path):
    argv = ("predict", str(demo_folder), "a text", "--file", str(tmp_path / "f"))
    assert "not both" in error_of(capsys, *argv)


def test_columns_without_data_are_refused(capsys, demo_folder):
    argv = ("evaluate", str(demo_folder), "--text-column", "body")
    assert "--data" in error_of(capsys, *argv)


def test_evaluate_gives_the_accuracy_of_training(capsys, demo_folder):
    want = json.loads((demo_folder / "summary.json").read_text())["result"]["test"]
    assert cli.main(["evaluate", str(demo_folder), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(want, abs=1e-6)
    assert cli.main(["evaluate", str(demo_folder)]) == 0
    assert f"accuracy         {want['accuracy']:.4f}\n" in capsys.readouterr().out


def test_evaluate_reads_other_data(capsys, demo_folder, tmp_path):
    """Both texts of one label and a label that is wrong half of the time: .5."""
    file = tmp_path / "mine.csv"
    file.write_text("body,mood\nlovely,positive\nlovely,negative\n")
    argv = ["evaluate", str(demo_folder), "--data", str(file), "--format", "json"]
    argv += ["--text-column", "body", "--label-column", "mood"]
    assert cli.main(argv) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["count"], got["accuracy"]) == (2, 0.5)


def test_predictions_agree_however_the_texts_arrive(
    capsys, demo_folder, tmp_path, stdin
):
    texts = ["the film was great .", "the plot was dull !", ""]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    outs = []
    stdin(file.read_bytes())
    for source in (texts, ["--file", str(file)], []):
        argv = ["predict", str(demo_folder), *source, "--format", "jsonl"]
        assert cli.main(argv) == 0
        outs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert outs[0] == outs[1] == outs[2]
    assert [one["text"] for one in outs[0]] == texts
    loaded = run.Run.load(demo_folder)
    for one, want in zip(outs[0], loaded.predict(texts), strict=True):
        assert one == {
            "text": want.text,
            "score": want.score,
            "label": want.label,
            "tokens": len(want.tokens),
            "unknown": want.unknown,
        }


@pytest.mark.parametrize("command", ["predict", "trace"])
def test_a_text_that_begins_with_a_dash_is_to_follow_two(capsys, demo_folder, command):
    for text in ("-good film", "--good film", "-g"):
        said = error_of(capsys, command, str(demo_folder), text)
        assert f"put -- before texts that begin with a dash, as {text!r}" in said
        assert cli.main([command, str(demo_folder), "--", text]) == 0
        assert text.strip("-").split()[0] in capsys.readouterr().out


def test_a_part_is_of_the_runs_own_data(capsys, demo_folder, tmp_path):
    """Also where that lies elsewhere now; all of it is told of, with a warning."""
    argv = ["evaluate", str(demo_folder), "--part", "train", "--data", "demo"]
    assert "has its own columns" in error_of(capsys, *argv, "--text-column", "text")
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "lovely,positive\nawful,negative\n" * 30)
    argv[-1] = str(other)
    assert "the data has changed since the run" in error_of(capsys, *argv)


def test_the_parts_of_data_that_has_moved_are_those_it_had(capsys, tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(list('abcdefgh'), 5))},{n % 2}" for n in range(60)]
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("text,label\n" + "\n".join(rows) + "\n")
    out = tmp_path / "run"
    argv = ["train", "--data", str(old), "--features", "4", "--embedding-size", "4"]
    argv += ["--epochs", "1", "--min-count", "1", "--quiet", "--out", str(out)]
    assert cli.main(argv) == 0
    capsys.readouterr()

    def answer(*argv):
        assert cli.main(["evaluate", str(out), *argv]) == 0
        return capsys.readouterr()

    want = answer("--part", "validation").out
    old.rename(new)
    moved = answer("--part", "validation", "--data", str(new))
    assert (moved.out, moved.err) == (want, "")
    everything = answer("--data", str(new))
    assert "count 60" in " ".join(everything.out.split())
    assert "was trained on, and all of it counts" in everything.err


@pytest.mark.parametrize("command", ["evaluate", "predict", "trace"])
def test_a_run_that_was_stopped_answers_and_that_is_told(
    capsys, source, tmp_path, command
):
    """Before it ever had a result, and when it went on after one."""
    folder = tmp_path / "ma course"
    argv = [command, str(folder), *(["a film"] if command != "evaluate" else [])]

    def train_and_stop(epochs, **how):
        stop = run.Stop()

        def after_an_epoch(event):
            if isinstance(event, run.EpochDone):
                stop.ask(15)

        config = make_config(source, epochs=epochs, test_with="last")
        with pytest.raises(run.Stopped):
            run.train(config, folder, on_event=after_an_epoch, stop=stop, **how)

    def answer():
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert out
        return err.splitlines()

    def told(after, epochs):
        return (
            f"flax-lstm: warning: the run in {folder} was stopped before it was done, "
            f"or still trains; its checkpoint after epoch {after} of {epochs} is "
            f"used. `flax-lstm train --resume --out '{folder}'` goes on."
        )

    train_and_stop(3)
    assert answer() == [told(1, 3)]
    run.train(make_config(source, epochs=3, test_with="last"), folder, resume=True)
    assert answer() == []
    train_and_stop(5, resume=True)
    first, second = answer()
    assert first == told(4, 5)
    assert "is used, not that of epoch 3, which was tested" in second


def test_text_output_is_one_line_a_text(capsys, demo_folder):
    assert cli.main(["predict", str(demo_folder), "a film", "ein Film\nmit Bruch"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" a film")
    assert second.endswith(" ein Film\\nmit Bruch")


def test_a_trace_ends_with_the_prediction(capsys, demo_folder):
    text = "the film was great ."
    (want,) = run.Run.load(demo_folder).predict([text])
    assert cli.main(["trace", str(demo_folder), text]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == text.split()
    assert f"= {want.label} {want.score:.2f}" in out


def test_a_reader_that_stops_reading_gets_no_traceback(demo_folder, tmp_path):
    """64 KiB fill a pipe: these 200 KiB and more cannot all be written."""
    file = tmp_path / "texts.txt"
    file.write_text("the film was great .\n" * 4000)
    argv = ("predict", str(demo_folder), "--format", "jsonl", "--file", str(file))
    with program(*argv) as process:
        assert json.loads(process.stdout.readline())["text"] == "the film was great ."
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert said == ""
