"""The command line: what it parses, prints and returns, and what it says of faults."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flax_lstm import cli, run
from flax_lstm.config import TUTORIAL, Config
from flax_lstm.train import NonFiniteLossError

SMALL = ["--features", "8", "--embedding-size", "8", "--epochs", "2", "--buckets", "1"]
SMALL += ["--batch-size", "512", "--learning-rate", "0.02"]
OURS = {**os.environ, "COLUMNS": "100"}


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[Path, str]:
    """A small run on the demo corpus: its folder, and what training it printed."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["train", "--out", str(folder), *SMALL]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def trained(session) -> Path:
    return session[0]


@pytest.fixture
def stdin(monkeypatch, tmp_path):
    """Gives the command line these bytes on its standard input."""

    def give(content: bytes) -> None:
        path = tmp_path / "stdin"
        path.write_bytes(content)
        monkeypatch.setattr(sys, "stdin", open(path, encoding="utf-8"))  # noqa: SIM115

    return give


def settings(*argv: str) -> Config:
    command = cli.parse(["train", *argv])
    assert isinstance(command, cli.Train)
    return command.settings


def program(*argv: str, **options) -> subprocess.Popen:
    """Starts the command line in a process of its own."""
    code = "import sys; from flax_lstm.cli import main; sys.exit(main())"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        **{"stdin": pipe, "stdout": pipe, "stderr": pipe, "env": OURS} | options,
    )


def error_of(capsys, *argv: str, code: int = 2) -> str:
    """Runs the command line, which must fail, and returns what it says."""
    assert cli.main(argv) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# Settings: preset, then file, then flags.


def test_no_flag_means_the_defaults():
    assert settings() == Config()


def test_the_tutorial_preset_takes_flags_on_top():
    got = settings("--preset", "tutorial", "--data", "FILE", "--max-length", "40")
    data = dataclasses.replace(TUTORIAL.data, data="FILE", max_length=40)
    assert got == dataclasses.replace(TUTORIAL, data=data)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nepochs = 7\nseed = 3\n")
    got = settings("--preset=tutorial", "--config", str(file), "--seed", "9")
    want = dataclasses.replace(TUTORIAL.training, epochs=7, seed=9)
    assert got == dataclasses.replace(TUTORIAL, training=want)


def test_the_printed_configuration_is_read_back(capsys, tmp_path):
    flags = ["--features", "3", "4", "--clip-norm", "None", "--no-sparse-embedding"]
    flags += ["--dropout", "0.25"]
    assert cli.main(["train", "--print-config", *flags]) == 0
    file = tmp_path / "config.json"
    file.write_text(capsys.readouterr().out)
    got = settings("--config", str(file))
    assert got == settings(*flags)
    assert got.model.features == (3, 4)
    assert got.training.clip_norm is None
    assert not got.training.sparse_embedding
    assert got.model.dropout == 0.25


def test_every_setting_has_a_flag_and_a_help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "Texts in one training step." in shown


def test_help_shows_the_defaults_of_the_preset_asked_about(capsys):
    assert cli.main(["train", "--preset", "tutorial", "--help"]) == 0
    assert "(default: adadelta)" in capsys.readouterr().out


# Wrong usage.


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "train"),
        (["trian"], "trian"),
        (["train", "--epohs", "3"], "--epochs"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--preset", "best"], "tutorial"),
        (["train", "--library", "haiku"], "linen"),
        (["evaluate"], "RUN"),
        (["trace"], "RUN"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_right(capsys, argv, words):
    assert words in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "0"], "data.batch_size must be at least 1; got 0"),
        (["--epochs", "-1"], "training.epochs must be at least 1; got -1"),
        (["--features", "0"], "model.features must be at least 1; got 0"),
        (["--learning-rate", "nan"], "learning_rate must be a number of 0 or more"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--resume"], "--resume needs --out"),
        (["--data", "no/such.csv"], "no/such.csv"),
        (["--config", "no/such.toml"], "cannot read configuration no/such.toml"),
    ],
)
def test_a_request_that_cannot_be_met_is_2(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_of(capsys, "train", *argv)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_folder_that_holds_a_run_is_left_alone(capsys, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"}
    assert "already holds a run" in error_of(capsys, "train", "--out", str(trained))
    after = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"}
    assert {p: after[p] for p in before if p.is_file()} == {
        p: before[p] for p in before if p.is_file()
    }


def test_resuming_nothing_is_an_error(capsys, tmp_path):
    said = error_of(capsys, "train", "--resume", "--out", str(tmp_path / "none"))
    assert "nothing to resume" in said


@pytest.mark.parametrize("command", ["evaluate", "predict", "trace"])
def test_a_folder_without_a_run_is_an_error(capsys, tmp_path, command):
    argv = [command, str(tmp_path), *(["a text"] if command != "evaluate" else [])]
    assert "holds no run" in error_of(capsys, *argv)


def test_texts_and_a_file_together_are_refused(capsys, trained, tmp_path):
    argv = ("predict", str(trained), "a text", "--file", str(tmp_path / "f"))
    assert "not both" in error_of(capsys, *argv)


def test_columns_without_data_are_refused(capsys, trained):
    argv = ("evaluate", str(trained), "--text-column", "body")
    assert "--data" in error_of(capsys, *argv)


# A failing run.


def test_a_loss_that_is_not_finite_is_1(capsys, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise NonFiniteLossError("step 3 gave loss nan")

    monkeypatch.setattr(run, "train", fails)
    said = error_of(capsys, "train", "--out", str(tmp_path / "r"), code=1)
    assert said.splitlines()[-1] == "flax-lstm: step 3 gave loss nan"


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    assert cli.main(["predict", str(tmp_path), "text", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "holds no run" in said.splitlines()[-1]


def test_a_keyboard_interrupt_is_130_and_says_how_to_go_on(
    capsys, monkeypatch, tmp_path
):
    def interrupted(config, folder, *, resume, on_event):
        on_event(
            run.RunStarted(tmp_path / "r", config, {}, 2, 1, 1, ("cpu",), first_epoch=1)
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    said = error_of(capsys, "train", "--out", "r", code=130)
    assert "flax-lstm train --resume --out r" in said


# Training, testing, predicting.


def test_training_prints_an_epoch_a_line_and_the_test_accuracy(session):
    folder, out = session
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    epochs = [line for line in out.splitlines() if line.startswith("Epoch: ")]
    assert len(epochs) == len(metrics) == 2
    for line, epoch in zip(epochs, metrics, strict=True):
        assert f"Epoch: {epoch['epoch']}/2 Batch: " in line
        assert f"Train Loss: {epoch['train_loss']:.3f} " in line
        assert line.endswith(f"Val Accuracy: {epoch['validation_accuracy']:.3f}")
    accuracy = json.loads((folder / "summary.json").read_text())["result"]["test"]
    assert f"\nTest Accuracy: {accuracy['accuracy']:.3f}\n" in out
    assert "\x1b" not in out  # not a terminal
    for text in cli.DEMO_TEXTS:
        assert f"\n{text.split()[0].lower()} " in out


def test_what_is_printed_to_try_next_can_be_pasted(session, capsys):
    folder, out = session
    _, _, advice = out.partition("Try:\n")
    commands = [shlex.split(line) for line in advice.splitlines() if line[:2] == "  "]
    *ready, own = commands
    assert len(ready) == 3
    for name, *argv in ready:
        assert name == "flax-lstm"
        assert str(folder) in argv
        assert cli.main(argv) == 0
        assert capsys.readouterr().out
    assert settings(*own[2:]).data.data == "FILE.csv"


def test_quiet_resuming_takes_the_recorded_settings_and_more_epochs(
    capsys, trained, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    argv = ["train", "--resume", "--quiet", "--out", str(folder), "--epochs", "3"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("Test Accuracy: ")
    assert out.count("\n") == 1
    before, after = (
        (f / "metrics.jsonl").read_text().splitlines() for f in (trained, folder)
    )
    assert after[:2] == before
    assert json.loads(after[2])["epochs"] == 3


def test_evaluate_gives_the_accuracy_of_training(capsys, trained):
    want = json.loads((trained / "summary.json").read_text())["result"]["test"]
    assert cli.main(["evaluate", str(trained), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(want, abs=1e-6)
    assert cli.main(["evaluate", str(trained)]) == 0
    assert f"accuracy         {want['accuracy']:.4f}\n" in capsys.readouterr().out


def test_evaluate_reads_other_data(capsys, trained, tmp_path):
    """Both texts of one label and a label that is wrong half of the time: .5."""
    file = tmp_path / "mine.csv"
    file.write_text("body,mood\nlovely,positive\nlovely,negative\n")
    argv = ["evaluate", str(trained), "--data", str(file), "--format", "json"]
    argv += ["--text-column", "body", "--label-column", "mood"]
    assert cli.main(argv) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["count"], got["accuracy"]) == (2, 0.5)


def test_predictions_agree_however_the_texts_arrive(capsys, trained, tmp_path, stdin):
    texts = ["the film was great .", "the plot was dull !", ""]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    outs = []
    stdin(file.read_bytes())
    for source in (texts, ["--file", str(file)], []):
        argv = ["predict", str(trained), *source, "--format", "jsonl"]
        assert cli.main(argv) == 0
        outs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert outs[0] == outs[1] == outs[2]
    assert [one["text"] for one in outs[0]] == texts
    loaded = run.Run.load(trained)
    for one, want in zip(outs[0], loaded.predict(texts), strict=True):
        assert one == {
            "text": want.text,
            "score": want.score,
            "label": want.label,
            "tokens": len(want.tokens),
            "unknown": want.unknown,
        }


def test_text_output_is_one_line_a_text(capsys, trained):
    assert cli.main(["predict", str(trained), "a film", "ein Film\nmit Bruch"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" a film")
    assert second.endswith(" ein Film\\nmit Bruch")


def test_a_trace_ends_with_the_prediction(capsys, trained):
    text = "the film was great ."
    (want,) = run.Run.load(trained).predict([text])
    assert cli.main(["trace", str(trained), text]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == text.split()
    assert f"= {want.label} {want.score:.2f}" in out


# What may stand on the standard input.


def test_line_ends_a_byte_order_mark_and_empty_lines(capsys, trained, stdin):
    stdin(b"\xef\xbb\xbfgood\r\n\r\nbad\nno end")
    assert cli.main(["predict", str(trained), "--format", "jsonl"]) == 0
    out = capsys.readouterr().out
    got = [json.loads(line)["text"] for line in out.splitlines()]
    assert got == ["good", "", "bad", "no end"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the standard input is empty"),
        (
            b"good\nna\xefve\n",
            "line 2 of the standard input is not UTF-8 (byte 3: 0xef)",
        ),
        (b"good\0\n", "line 1 of the standard input holds a NUL byte"),
        ("good\n".encode("utf-16"), "NUL byte"),
    ],
    ids=["empty", "latin1", "nul", "utf16"],
)
def test_input_that_is_no_text_is_an_error(capsys, trained, stdin, content, words):
    stdin(content)
    assert words in error_of(capsys, "predict", str(trained))


def test_a_line_of_ten_megabytes_is_cut_to_max_length(capsys, trained, stdin):
    stdin(b"good " * 2_000_000 + b"\n")
    assert cli.main(["predict", str(trained), "--format", "jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["tokens"] == Config().data.max_length


def test_a_missing_file_is_an_error(capsys, trained, tmp_path):
    file = tmp_path / "none.txt"
    said = error_of(capsys, "predict", str(trained), "--file", str(file))
    assert f"cannot read {file}" in said


def test_an_argument_that_is_not_utf8_is_an_error(capsys, trained):
    """Python hands such bytes over as lone surrogates."""
    said = error_of(capsys, "predict", str(trained), "na\udcefve")
    assert "UTF-8" in said


# In a process of its own.


def test_wrong_usage_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from flax_lstm.cli import main; code = main(['train', '--no']); "
        "heavy = {'flax', 'optax', 'orbax', 'datasets', 'tokenizers'} & {*sys.modules};"
        "sys.exit(f'{code} {heavy}' if heavy or code != 2 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_reading_gets_no_traceback(trained, tmp_path):
    """64 KiB fill a pipe: these 200 KiB and more cannot all be written."""
    file = tmp_path / "texts.txt"
    file.write_text("the film was great .\n" * 4000)
    argv = ("predict", str(trained), "--format", "jsonl", "--file", str(file))
    with program(*argv) as process:
        assert json.loads(process.stdout.readline())["text"] == "the film was great ."
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert said == ""


def test_terminated_training_ends_with_143_and_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "--out", str(folder), *SMALL, "--patience", "None"]
    with program(*argv, "--epochs", "1000") as process:
        for line in process.stdout:
            if line.startswith(b"Epoch: 1/"):
                break
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said.decode().splitlines()[-1] == "flax-lstm: terminated."
    assert f"--resume --out {folder}" in said.decode()
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    code = cli.main(
        [
            "train",
            "--resume",
            "--out",
            str(folder),
            "--epochs",
            "1000",
            "--print-config",
        ]
    )
    assert code == 0
    assert done >= 1
    assert run.Run.load(folder).metrics["epochs"]


def test_the_version_is_the_package_s(capsys):
    import importlib.metadata

    assert cli.main(["--version"]) == 0
    version = importlib.metadata.version("flax-lstm")
    assert capsys.readouterr().out == f"flax-lstm {version}\n"
