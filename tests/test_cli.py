"""The command line: what it parses, and what it says of wrong usage."""

import ast
import dataclasses
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import warm
from command_lines import error_of, settings

from flax_lstm import cli
from flax_lstm.commands.terminal import program, without_echoes
from flax_lstm.config import TUTORIAL, Config


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "-1"],
        ["--dropout", "1"],
        ["--features", "1000000000"],
        ["--mesh", "rows=2"],
        ["--mesh", "data=1000"],
        ["--mesh", "rows=2", "--distributed", "auto"],
    ],
    ids=" ".join,
)
def test_settings_that_training_refuses_are_not_printed(capsys, tmp_path, flags):
    out = str(tmp_path / "run")
    alone = flags[:2]  # training would look for the other processes first
    want = error_of(capsys, "train", "--out", out, *alone)
    assert cli.main(["train", "--print-config", *flags]) == 2
    assert capsys.readouterr() == ("", want)


def test_a_mesh_of_processes_to_come_is_printed(capsys):
    argv = ["train", "--print-config", "--mesh", "data=1000", "--distributed", "auto"]
    assert cli.main(argv) == 0
    assert '"mesh": "data=1000"' in capsys.readouterr().out


def test_every_setting_has_a_flag_and_a_help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "Texts in one training step." in shown


def test_help_breaks_a_line_only_where_the_next_word_does_not_fit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "--help"]) == 0
    # The panels have a border of two columns, drawn or blank.
    rows = capsys.readouterr().out.replace("│", " ").splitlines()
    start = next(row.find("show this help") for row in rows if "--help " in row)
    width = 100 - 2 - start
    breaks = 0
    for row, below in itertools.pairwise(rows):
        text, word = row[start:].rstrip(), below[start:].split(" ")[0]
        helped = text and row[start - 2 : start] == "  " and row[start] != " "
        if helped and word and not below[1:start].strip():
            assert len(text) + 1 + len(word) > width, text
            breaks += 1
    assert breaks > 5


def test_help_shows_the_defaults_of_the_preset_asked_about(capsys):
    assert cli.main(["train", "--preset", "tutorial", "--help"]) == 0
    assert "(default: adadelta)" in capsys.readouterr().out


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
        (["--out", ""], "--out is empty"),
        (
            ["--resume", "--out", "r", "--preset", "tutorial"],
            "--resume takes the settings of the run; leave out --preset tutorial",
        ),
        (["--auto-resume", "--out="], "--out is empty"),
        (["--data", "no/such.csv"], "no/such.csv"),
        (["--config", "no/such.toml"], "cannot read configuration no/such.toml"),
    ],
)
def test_a_request_that_cannot_be_met_is_2(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_of(capsys, "train", *argv)
    assert not list(tmp_path.rglob("checkpoints"))


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    assert cli.main(["predict", str(tmp_path), "text", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "holds no run" in said.splitlines()[-1]


def test_wrong_usage_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from flax_lstm.cli import main; code = main(['train', '--no']); "
        "heavy = {'flax', 'optax', 'orbax', 'datasets', 'tokenizers'} & {*sys.modules};"
        "sys.exit(f'{code} {heavy}' if heavy or code != 2 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_package_s(capsys):
    import importlib.metadata

    assert cli.main(["--version"]) == 0
    version = importlib.metadata.version("flax-lstm")
    assert capsys.readouterr().out == f"flax-lstm {version}\n"


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--version"], 0, "flax-lstm 0.", ""),
        (["predict", "no/run", "a"], 2, "", "flax-lstm: no/run holds no run"),
    ],
)
def test_the_module_is_the_command(argv, code, out, err):
    argv = [sys.executable, "-m", "flax_lstm", *argv]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:12], done.stderr[:30]) == (code, out, err)


def test_what_is_printed_to_be_pasted_is_how_the_module_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/flax_lstm/__main__.py"])
    assert program() == f"{sys.executable} -m flax_lstm"


KEEP = """
import sys, jax
from flax_lstm import cli
command = cli.parse(["predict", "nowhere", "a text", *sys.argv[1:]])
cli.keep_programs(command)
print(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("flags", "variables", "kept"),
    [
        ([], {"XDG_CACHE_HOME": "{}/home"}, "{}/home/flax-lstm/xla"),
        ([], {"JAX_COMPILATION_CACHE_DIR": "{}/mine"}, "{}/mine"),
        (["--no-compilation-cache"], {}, "False"),
        ([], {"JAX_ENABLE_COMPILATION_CACHE": "0"}, "False"),
    ],
    ids=["user's cache", "variable", "flag", "JAX's switch"],
)
def test_programs_are_kept_unless_told_otherwise(tmp_path, flags, variables, kept):
    clean = {n: v for n, v in os.environ.items() if not n.startswith("JAX_COMP")}
    done = subprocess.run(
        [sys.executable, "-c", KEEP, *flags],
        capture_output=True,
        text=True,
        env=clean | {name: v.format(tmp_path) for name, v in variables.items()},
    )
    assert done.stdout.strip() == kept.format(tmp_path), done.stderr


def test_only_the_echoes_of_a_failed_write_are_left_out():
    told = []
    hook = without_echoes(lambda unraisable: told.append(unraisable.exc_value))
    others = [RuntimeError("dictionary changed"), OSError("Event loop is closed")]
    for error in (RuntimeError("Event loop is closed"), *others):
        hook(types.SimpleNamespace(exc_value=error))
    assert told == others


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPT = """
import runpy, sys
_, sys.path[0], *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "script",
    [
        path.name
        for path in sorted(EXPERIMENTS.glob("*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ],
)
def test_a_script_of_the_experiments_says_what_it_does(script, tmp_path):
    if script == "train_step_cost.py":
        pytest.importorskip("torch")  # against which it measures
    path = EXPERIMENTS / script
    argv = [str(EXPERIMENTS), str(path), "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    child = warm.start(SCRIPT, argv, environment, tmp_path)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert out.startswith(f"usage: {script} [-h]")
    first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert first.splitlines()[0] in " ".join(out.split())


def test_closed_streams_end_in_no_traceback():
    """As `flax-lstm --version >&-`; Python then has None for the stream."""
    code = (
        "import sys; sys.stdout = sys.stderr = None\n"
        "from flax_lstm.cli import main\n"
        "sys.exit(main(['--version']) + 10 * main(['trian']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (20, b"", b"")
