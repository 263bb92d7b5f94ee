"""`flax-lstm train`: what it prints, and how it is stopped."""

import json
import os
import re
import shlex
import shutil
import signal

import pytest
from command_lines import SMALL, error_of, program, settings

from flax_lstm import cli, run
from flax_lstm.finite import NonFiniteLossError
from flax_lstm.mesh import IN_ORDER

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_a_folder_that_holds_a_run_is_left_alone(capsys, demo_folder):
    before = {
        p: p.stat().st_mtime_ns for p in demo_folder.rglob("*") if p.name != ".lock"
    }
    assert "already holds a run" in error_of(capsys, "train", "--out", str(demo_folder))
    after = {
        p: p.stat().st_mtime_ns for p in demo_folder.rglob("*") if p.name != ".lock"
    }
    assert {p: after[p] for p in before if p.is_file()} == {
        p: before[p] for p in before if p.is_file()
    }


def test_resuming_nothing_is_an_error(capsys, tmp_path):
    said = error_of(capsys, "train", "--resume", "--out", str(tmp_path / "none"))
    assert "nothing to resume" in said


def test_a_loss_that_is_not_finite_is_1(capsys, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise NonFiniteLossError("step 3 gave loss nan")

    monkeypatch.setattr(run, "train", fails)
    said = error_of(capsys, "train", "--out", str(tmp_path / "r"), code=1)
    assert said.splitlines()[-1] == "flax-lstm: step 3 gave loss nan"


def test_a_keyboard_interrupt_is_130_and_says_how_to_go_on(
    capsys, monkeypatch, tmp_path
):
    def interrupted(config, folder, *, on_event, stop, **_):
        on_event(
            run.RunStarted(tmp_path / "r", config, {}, 2, 1, 1, ("cpu",), first_epoch=1)
        )
        stop.ask(signal.SIGINT)

    monkeypatch.setattr(run, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    said = error_of(capsys, "train", "--out", "r", code=130)
    assert said.startswith("flax-lstm: interrupted: stopped ")
    assert said.endswith("`flax-lstm train --resume --out r` goes on.\n")


def test_training_prints_an_epoch_a_line_and_the_test_accuracy(demo_run):
    folder, out = demo_run
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    epochs = [line for line in out.splitlines() if line.startswith("Epoch: ")]
    assert len(epochs) == len(metrics) == 2
    for line, epoch in zip(epochs, metrics, strict=True):
        assert f"Epoch: {epoch['epoch']}/2 Batch: " in line
        assert f"Train Loss: {epoch['train_loss']:.3f} " in line
        assert line.endswith(f"Val Accuracy: {epoch['validation_accuracy']:.3f}")
    result = json.loads((folder / "summary.json").read_text())["result"]
    accuracy = result["test"]
    assert (
        f"First step after {result['startup_seconds']:.1f} s: imports "
        f"{result['startup_import_seconds']:.1f} s, data "
        f"{result['startup_data_seconds']:.1f} s, compilation "
        f"{result['startup_compile_seconds']:.1f} s.\n"
        f"Input wait {result['wait_share']:.1%} of the training time.\n"
    ) in out
    assert f"\nTest Accuracy: {accuracy['accuracy']:.3f}\n" in out
    assert "\x1b" not in out  # not a terminal
    for text in cli.DEMO_TEXTS:
        assert f"\n{text.split()[0].lower()} " in out


def test_what_is_printed_to_try_next_can_be_pasted(demo_run, capsys):
    folder, out = demo_run
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


def test_a_run_on_texts_of_ones_own_is_not_told_how_to_give_them(
    capsys, trained, tmp_path
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("  flax-lstm evaluate ")
    assert "FILE.csv" not in out


def test_a_finished_run_whose_data_has_moved_is_shown_as_the_message_says(
    capsys, source, tmp_path
):
    old, new = (tmp_path / name for name in ("old.csv", "new.csv"))
    old_test, new_test = (tmp_path / name for name in ("old-test.csv", "new-test.csv"))
    shutil.copy(source, old)
    old_test.write_text("text,label\na lovely film,good\n")
    folder = str(tmp_path / "run")
    argv = ["train", "--data", str(old), "--test-data", str(old_test), *SMALL]
    assert cli.main([*argv, "--out", folder]) == 0
    accuracy = re.search("Test Accuracy: .*", capsys.readouterr().out)
    assert accuracy
    old.rename(new)
    old_test.rename(new_test)
    argv = ["train", "--resume", "--out", folder]
    for flag, what, gone, there in (
        ("--data", "data", old, new),
        ("--test-data", "test data", old_test, new_test),
    ):
        assert error_of(capsys, *argv) == (
            f"flax-lstm: the {what} of the run in {folder} is no longer at {gone}; "
            f"put it back, or give its new place by {flag}.\n"
        )
        argv += [flag, str(there)]
    assert cli.main(argv) == 0
    assert accuracy[0] in capsys.readouterr().out


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def of_another_run(path):
    path.write_text(path.read_text().replace("lovely", "lovelier"))


@pytest.mark.parametrize("damage", [cut_off, of_another_run, os.remove])
@pytest.mark.parametrize("epochs", [4, 5], ids=["finished", "goes on"])
def test_a_damaged_tokenizer_is_refused_and_written_anew_as_the_message_says(
    capsys, trained, tmp_path, damage, epochs
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    path = folder / "tokenizer.json"
    whole = path.read_text()
    damage(path)
    damaged = path.read_text() if path.exists() else None
    for argv in (["predict", str(folder), "a film"], ["evaluate", str(folder)]):
        said = error_of(capsys, *argv)
        assert path.name in said
        assert f"let `flax-lstm train --resume --out {folder}` write it anew" in said
    argv = ["train", "--resume", "--out", str(folder), "--epochs", str(epochs)]
    assert cli.main(argv) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"flax-lstm: warning: {path} is lost, damaged or of another run; it is written "
        "anew from the data"
    )
    assert path.read_text() == whole
    kept = [one.read_text() for one in folder.glob("tokenizer-damaged*")]
    assert kept == ([] if damaged is None else [damaged])
    assert said.endswith("; what was there is now tokenizer-damaged-1.") == bool(kept)
    assert cli.main(["predict", str(folder), "a film"]) == 0
    assert capsys.readouterr().err == ""


def test_quiet_resuming_takes_the_recorded_settings_and_more_epochs(
    capsys, demo_folder, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(demo_folder, folder)
    argv = ["train", "--resume", "--quiet", "--out", str(folder), "--epochs", "3"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("Test Accuracy: ")
    assert out.count("\n") == 1
    before, after = (
        (f / "metrics.jsonl").read_text().splitlines() for f in (demo_folder, folder)
    )
    assert after[:2] == before
    assert json.loads(after[2])["epochs"] == 3


def test_terminated_training_ends_with_143_and_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "--out", str(folder), *SMALL[:4], *SMALL[6:]]
    with program(*argv, "--patience", "None", "--epochs", "1000") as process:
        for line in process.stdout:
            if line.startswith(b"Epoch: 1/"):
                break
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    last = said.decode().splitlines()[-1]
    assert re.fullmatch(
        r"flax-lstm: terminated: stopped after step \d+ of 50000, which is saved; "
        rf"`.*flax-lstm train --resume --out {folder}` goes on\.",
        last,
    )
    assert run.Run.load(folder).metrics["epochs"]


def test_what_belongs_to_resuming_is_refused_without_it(capsys, tmp_path):
    said = error_of(capsys, "train", "--cast-dtype", "--out", str(tmp_path / "r"))
    assert "--cast-dtype is for --resume" in said
    assert "--auto-resume" in error_of(capsys, "train", "--auto-resume")
    assert not (tmp_path / "r").exists()


def test_a_mesh_of_one_cpu_trains_where_its_exchanges_come_in_order(tmp_path):
    argv = ("train", *SMALL, "--mesh", "data=2,model=2", "--out", str(tmp_path / "run"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    for flags, code in (("", 2), (IN_ORDER, 0)):
        child = program(*argv, env=environment | {"XLA_FLAGS": flags})
        out, err = child.communicate(timeout=300)
        assert child.returncode == code, err.decode()
    assert b"on 4 x cpu" in out
