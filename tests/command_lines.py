"""Runs the command line, here or in a process of its own."""

import os
import subprocess
import sys

from flax_lstm import cli
from flax_lstm.config import Config

SMALL = ["--features", "8", "--embedding-size", "8", "--epochs", "2", "--buckets", "1"]


def settings(*argv: str) -> Config:
    command = cli.parse(["train", *argv])
    assert isinstance(command, cli.Train)
    return command.settings


def program(*argv: str, **options) -> subprocess.Popen:
    """Starts the command line in a process of its own, its output held back."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"}
    environment["COLUMNS"] = "100"
    code = "import sys; from flax_lstm.cli import main; sys.exit(main())"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        **{"stdin": pipe, "stdout": pipe, "stderr": pipe, "env": environment} | options,
    )


def error_of(capsys, *argv: str, code: int = 2) -> str:
    """Runs the command line, which must fail, and returns what it says."""
    assert cli.main(argv) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said
