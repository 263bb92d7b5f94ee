"""Wrong usage and garbage on the command line.

One line on the standard error, exit code 2, before anything is compiled or written.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import program
from fault_runs import TINY, train_argv

from flax_lstm import cli
from flax_lstm import folder as files

pytestmark = pytest.mark.usefixtures("compilation_cache")
MAIN = "import sys; from flax_lstm.cli import main; sys.exit(main())"


@pytest.fixture
def refused(capsys, no_compile, tmp_path, monkeypatch):
    """Runs a command that must be refused; returns the one line that it says."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("flax-lstm: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.fixture
def done(trained) -> str:
    """The folder of a finished run."""
    return str(trained[0].folder)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Expected one of {train, evaluate, predict, trace, bench}"),
        (["trian"], "Unrecognized options: trian"),
        (["train", "--epohs", "3"], "Perhaps you meant: --epochs"),
        (["train", "--hidden", "0"], "Unrecognized options: --hidden, 0"),
        (["train", "--hidden", "0"], "run flax-lstm train --help"),
        (["train", "my.csv"], "options: my.csv (data are given by --data my.csv)"),
        (["train", "--epochs", "1", "my.csv"], "data are given by --data my.csv"),
        (["train", "--epochs"], "Missing value for argument '--epochs'"),
        (["train", "--epochs", "many"], "Error parsing --epochs"),
        (["train", "--preset", "best"], "invalid choice 'best'"),
        (
            ["evaluate", "run", "--part", "all"],
            "invalid choice 'all' for argument '--part'",
        ),
        (["predict"], "RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flag(refused, argv, words):
    assert words in refused(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--epochs", "3", "--epochs", "4"], "--epochs was given more than"),
        (["train", "--epochs=3", "--seed", "1", "--epochs=3"], "--epochs was given"),
        (["train", "--batch-size", "3", "--batch_size", "4"], "--batch-size was given"),
        (["train", "--features", "--features", "4"], "--features was given"),
        (
            ["train", "--sparse-embedding", "--no-sparse-embedding"],
            "--sparse-embedding and --no-sparse-embedding contradict",
        ),
        (["predict", "run", "--format", "text", "--format", "jsonl"], "--format was"),
    ],
    ids=["twice", "same value", "underscore", "list", "contradiction", "predict"],
)
def test_flag_twice(refused, argv, words):
    assert words in refused(*argv)


def test_a_text_may_look_like_a_flag_given_twice(capsys, done):
    argv = ["predict", done, "--format", "jsonl", "--", "--x", "--x"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["--x", "--x"]


NUMBERS = ["0", "-1", "1e9", "1000000000", "nan", "inf", ""]


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    "flag", ["--features", "--embedding-size", "--batch-size", "--max-length"]
)
def test_size_of_zero_minus_one_nan_or_a_thousand_million(refused, source, flag, value):
    argv = ["train", "--data", str(source), "--out", "run", flag, value]
    if flag == "--max-length":  # else a bound that any text is below
        argv += ["--pipeline", "tutorial"]
    line = refused(*argv)
    assert flag.strip("-").replace("-", "_") in line.replace("-", "_")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "1e999", "x", ""])
@pytest.mark.parametrize(
    "flag",
    [
        *("--learning-rate", "--dropout", "--weight-decay", "--clip-norm", "--epsilon"),
        *("--embedding-scale", "--rho", "--warmup-fraction", "--validation-fraction"),
        *("--test-fraction",),
    ],
)
def test_number_out_of_range(refused, source, flag, value):
    line = refused("train", "--data", str(source), "--out", "run", f"{flag}={value}")
    assert flag.strip("-").replace("-", "_") in line.replace("-", "_")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--epochs", v) for v in ("0", "-1", "1.5", "nan")),
        *(("--seed", v) for v in ("-1", "4294967296", "9" * 40, "1.5")),
        *(("--patience", v) for v in ("0", "nan")),
        *(("--buckets", v) for v in ("0", "-1")),
        ("--forget-bias", "nan"),
        ("--min-count", "0"),
        ("--min-count", "1000000000"),
        ("--vocabulary-size", "0"),
    ],
)
def test_whole_number_out_of_range(refused, source, flag, value):
    line = refused("train", "--data", str(source), "--out", "run", flag, value)
    assert flag.strip("-").replace("-", "_") in line.replace("-", "_")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--data", "no.csv", "--out", "run"], "no file or folder no.csv"),
        (
            ["train", "--data", "no.parquet", "--out", "run"],
            "no file or folder no.parquet",
        ),
        (
            ["train", "--test-data", "no.csv", "--out", "run"],
            "no file or folder no.csv",
        ),
        (["train", "--config", "no.toml"], "cannot read configuration no.toml"),
        (["predict", "norun", "text"], "norun holds no run"),
        (["predict", "norun", "--file", "x"], "norun holds no run"),
        (["trace", "norun", "text"], "norun holds no run"),
        (["evaluate", "norun"], "norun holds no run"),
        (["train", "--resume", "--out", "norun"], "nothing to resume"),
        (["train", "--resume"], "--resume needs --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_missing_file_or_run(refused, argv, words):
    assert words in refused(*argv)


def test_missing_file_of_texts(refused, done):
    assert "cannot read no.txt" in refused("predict", done, "--file", "no.txt")
    assert "cannot read ." in refused("predict", done, "--file", ".")


def test_a_run_that_cannot_begin_leaves_no_folder(refused, source, tmp_path):
    """Where the run chooses its folder, and where it was told one."""
    (tmp_path / "bad.csv").write_text("text,label\none,1\n")
    many = ["--data", str(source), "--epochs", "1000000000", "--batch-size", "8"]
    for more in ([], ["--out", "a/b"]):
        assert "bad.csv" in refused("train", "--data", "bad.csv", *more)
        assert "can be counted" in refused("train", *many, *more)


def test_output_exists(refused, source, trained, tmp_path):
    """As a run, with these settings or with others, and as a file."""
    shutil.copytree(trained[0].folder, tmp_path / "run")
    (tmp_path / "file").write_text("precious")
    before = files.read_json(tmp_path / "run" / files.SUMMARY)
    for more in ([], ["--features", "9"]):
        said = refused("train", "--data", str(source), "--out", "run", *more)
        assert "already holds a run" in said
    said = refused("train", "--data", str(source), "--out", "file")
    assert "cannot write to the run folder" in said
    assert files.read_json(tmp_path / "run" / files.SUMMARY) == before
    assert (tmp_path / "file").read_text() == "precious"


def test_resume_with_other_settings(refused, trained, tmp_path):
    shutil.copytree(trained[0].folder, tmp_path / "run")
    said = refused("train", "--resume", "--out", "run", "--features", "9")
    assert "model.features = (5,)" in said
    assert "(9,)" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (files.TOKENIZER, "cannot read the tokenizer"),
        (files.SUMMARY, "cannot read"),
        (files.CONFIG, "holds no run"),
    ],
)
def test_run_without_vocabulary(refused, done, tmp_path, name, words):
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert words in refused("predict", "run", "a text")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '"a"', "[" * 10**5])
@pytest.mark.parametrize("name", [files.TOKENIZER, files.SUMMARY, files.CONFIG])
def test_run_with_a_damaged_file(refused, done, tmp_path, name, content):
    if (name, content) == (files.CONFIG, "{}"):
        pytest.skip("an empty table of settings means the defaults")
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert name in refused("predict", "run", "a text")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the standard input is empty"),
        (b"good\nna\xefve\n", "line 2 of the standard input is not UTF-8 (byte 3"),
        (b"good\0bad\n", "line 1 of the standard input holds a NUL byte"),
        ("good\n".encode("utf-16"), "NUL byte"),
        (bytes(range(256)) * 40, "line 1 of the standard input holds a NUL byte"),
    ],
    ids=["empty", "latin1", "nul", "utf16", "garbage"],
)
@pytest.mark.parametrize("command", ["predict", "trace"])
def test_predict_with_garbage_on_the_standard_input(
    refused, done, stdin, command, content, words
):
    stdin(content)
    assert words in refused(command, done)


def test_predict_with_a_closed_standard_input(refused, done, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "the standard input is closed" in refused("predict", done)


def test_predict_from_what_has_no_lines(refused, done):
    said = refused("predict", done, "--file", "/dev/zero")
    assert "line 1 of /dev/zero is longer than 64 MiB" in said


def test_predict_with_crlf_and_no_last_line_end(capsys, done, stdin):
    stdin(b"good\r\n\r\nbad")
    assert cli.main(["predict", done, "--format", "jsonl"]) == 0
    got = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert got == ["good", "", "bad"]


PEAK = """
import atexit, resource, sys
def peak(): print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
atexit.register(peak)
"""


def test_predict_with_a_line_of_10_mb(done, tmp_path):
    """Memory: a handful of copies of the line, not a vector for each of its words."""
    peaks = []
    for count in (1, 1_500_000):
        file = tmp_path / "texts.txt"
        file.write_text("lovely " * count + "\n")
        ended = subprocess.run(
            [sys.executable, "-c", PEAK + MAIN, "predict", done, "--file", str(file)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(ended.stderr.split()[-1]))
    assert peaks[1] - peaks[0] < 10 * 10_500  # kB; a float for each word is 4 MB more


def test_predictions_into_head(done, tmp_path):
    """64 KiB fill a pipe; 200 KiB and more cannot all be written."""
    file = tmp_path / "texts.txt"
    file.write_text("a lovely film\n" * 4000)
    for more in ([], ["--format", "jsonl"]):
        with program("predict", done, "--file", str(file), *more) as process:
            assert b"lovely" in process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read()
            assert process.wait(120) == 141
        assert said == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_predictions_onto_a_full_disk(done):
    """Those that are written at once, and those that are held back until the end."""
    for more in ([], ["--format", "jsonl"]):
        with (
            open("/dev/full", "w") as full,
            program("predict", done, *more, "a film", stdout=full) as process,
        ):
            said = process.stderr.read().decode()
            assert process.wait(120) == 1
        assert said.splitlines() == ["flax-lstm: [Errno 28] No space left on device"]


def test_json_is_one_object_a_line_and_all_else_goes_elsewhere(done, tmp_path):
    """Whatever is in the texts, and with a warning and the log switched on."""
    file = tmp_path / "odd.txt"
    texts = ['a "quoted" film', "tab\there", "\x1b[31mred", "\u2028", "😀", "", "\\n"]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    warn = "import warnings; warnings.simplefilter('always');"
    fault = (
        "import flax_lstm.trained as t, warnings, logging\n"
        "before = t.Run.predict\n"
        "def predict(*a):\n"
        "    warnings.warn('look'); logging.getLogger('jax').error('a log')\n"
        "    return before(*a)\n"
        "t.Run.predict = predict\n"
    )
    argv = ["predict", done, "--format", "jsonl", "--file", str(file)]
    ended = subprocess.run(
        [sys.executable, "-c", warn + fault + MAIN, *argv],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    lines = ended.stdout.decode().removesuffix("\n").split("\n")
    assert [json.loads(line)["text"] for line in lines] == texts
    assert b"flax-lstm: warning: look" in ended.stderr
    assert b"a log" in ended.stderr
    argv = ["evaluate", done, "--format", "json"]
    ended = subprocess.run(
        [sys.executable, "-c", MAIN, *argv], capture_output=True, check=True
    )
    assert json.loads(ended.stdout)["count"] == 8
    assert ended.stdout.count(b"\n") == 1


def test_a_quiet_run_prints_the_accuracy_alone(source, tmp_path, capsys):
    argv = train_argv(source, tmp_path / "run", "--quiet")
    assert TINY[-1] in argv
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Test Accuracy: ")
    assert (out.count("\n"), err) == (1, "")
