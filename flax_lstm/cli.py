"""The command line: `flax-lstm train | evaluate | predict | trace | bench`.

Results go to the standard output, messages and live progress to the standard error.
JAX and the data libraries are imported by the commands that need them, after the
arguments have been found right.

Exit codes: 0 all done and on disk; 1 the run failed; 2 wrong usage or input; 129 the
terminal hung up; 130 interrupted; 141 nobody reads the output any more; 143 terminated.
"""

import importlib.metadata
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import tyro

from flax_lstm.bench.options import BenchOptions
from flax_lstm.commands.answers import evaluate, predict, trace
from flax_lstm.commands.arguments import (
    Command,
    Common,
    Evaluate,
    Predict,
    Start,
    Trace,
    Train,
)
from flax_lstm.commands.signals import exit_code
from flax_lstm.commands.terminal import (
    FAILED,
    INTERRUPTED,
    UNREAD,
    USAGE,
    Screen,
    say,
    without_echoes,
)
from flax_lstm.commands.training import DEMO_TEXTS, print_config, train
from flax_lstm.commands.usage import check_given_once, check_out, one_line
from flax_lstm.config import PRESETS, Config, UserError
from flax_lstm.environment import use_compilation_cache
from flax_lstm.host_memory import keep_freed_memory
from flax_lstm.startup import process_start
from flax_lstm.stopping import Stopped

__all__ = ["DEMO_TEXTS", "Train", "execute", "main", "parse"]


SIGNALS = {1: "hung up", 2: "interrupted", 15: "terminated"}
"""What a signal that ends a run did, in a word."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    code = _run(argv)
    try:
        sys.stdout.flush()
    except OSError:  # of which _run has spoken, unless it is that of a help text
        # Python would flush once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or FAILED
    if code and "jax" in sys.modules:
        from flax_lstm import distributed

        distributed.leave(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    """Runs the command line; says what went wrong."""
    from_shell = argv is None
    started = process_start() if from_shell else time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if from_shell and not debug:
        sys.unraisablehook = without_echoes(sys.unraisablehook)
    for name in ("stdout", "stderr"):  # None where they were closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 as they are kept
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows little
            stream.reconfigure(errors="backslashreplace")
    try:
        command = parse(argv)
        if isinstance(command, Train):
            keep_freed_memory()
        if command is not None:
            execute(command, started)
        sys.stdout.flush()  # here, so that a closed pipe shows before the end
    except SystemExit as stop:  # usage, as tyro reports it
        return stop.code if isinstance(stop.code, int) else USAGE
    except UserError as error:
        return _failed(error, USAGE, debug)
    except BrokenPipeError:
        return UNREAD
    except KeyboardInterrupt:
        say("interrupted.")
        return INTERRUPTED
    except Stopped as stopped:
        say(f"{SIGNALS.get(stopped.reason, 'stopped')}: {stopped}.")
        return exit_code(stopped.reason)
    except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
        return _failed(error, FAILED, debug)
    return 0


def parse(argv: Sequence[str]) -> Command | None:
    """Returns the command with every setting in place, or None if all is done.

    Preset, configuration file and flags are put over each other in this order.

    Raises:
      UserError: If an argument or the configuration file is wrong.
      SystemExit: On `--help`, with 0.
    """
    with one_line(argv):
        return _parse(argv)


def _parse(argv: Sequence[str]) -> Command | None:
    if argv[:1] == ["--version"]:
        print(f"flax-lstm {importlib.metadata.version('flax-lstm')}")
        return None
    check_given_once(argv)
    check_out(argv)
    settings = Config()
    if argv[:1] == ["train"]:
        start, _ = tyro.cli(
            Start,
            prog="flax-lstm train",
            args=argv[1:],
            return_unknown_args=True,
            add_help=False,
        )
        settings = starting_point(start)
    return tyro.cli(
        Annotated[
            Annotated[
                Train,
                tyro.conf.subcommand(
                    "train",
                    default=Train(settings=settings),
                    description="Trains a classifier on the demo corpus or on --data.",
                ),
            ]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Predict, tyro.conf.subcommand("predict")]
            | Annotated[Trace, tyro.conf.subcommand("trace")]
            | Annotated[
                BenchOptions,
                tyro.conf.subcommand("bench"),
                tyro.conf.FlagCreatePairsOff,
            ],
            tyro.conf.OmitArgPrefixes,
        ],
        prog="flax-lstm",
        description="A sentiment classifier on the LSTM for JAX: `flax-lstm train` "
        "starts.\n\n`flax-lstm COMMAND --help` tells the rest, `--version` the "
        "version.",
        args=argv,
    )


def starting_point(start: Start) -> Config:
    """Returns the settings that the flags are put over.

    Raises:
      UserError: If there is a preset beside the settings of a run, or no such file.
    """
    if start.resume and start.preset != "default":
        raise UserError(
            f"--resume takes the settings of the run; leave out --preset "
            f"{start.preset}."
        )
    base = PRESETS[start.preset]
    if start.resume and start.out is not None:
        recorded = start.out / "config.json"
        # Where it cannot be looked for, that is told when the run is.
        base = Config.load(recorded) if os.path.exists(recorded) else base
    return base if start.config is None else Config.load(start.config, base)


def execute(command: Command, started: float | None = None) -> None:
    """Does what the command says.

    Args:
      command: From `parse`.
      started: When the command started, by `time.perf_counter`; now when None.
    """
    quieten_libraries(command.debug)
    keep_programs(command)
    match command:
        case Train(print_config=True):
            print_config(command)
        case Train():
            train(command, started)
        case Evaluate():
            evaluate(command)
        case Predict():
            predict(command)
        case Trace():
            trace(command)
        case BenchOptions():
            from flax_lstm.bench.main import bench

            bench(command, Screen())


def keep_programs(command: Command) -> None:
    """Keeps compiled programs on disk, where neither the command nor JAX says no."""
    import jax

    if not isinstance(command, Common) or getattr(command, "print_config", False):
        return
    if command.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.values["jax_enable_compilation_cache"]:
        use_compilation_cache()


def quieten_libraries(debug: bool) -> None:
    """Keeps the libraries' notes off the screen; their errors still show."""
    if not debug:
        for name in ("orbax", "jax", "datasets", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Orbax logs there, with a traceback for each of its threads, what it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")


def _failed(error: Exception, code: int, debug: bool) -> int:
    """Prints an error as one message and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    say(f"{error or type(error).__name__}")
    return code
