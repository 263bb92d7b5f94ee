"""The command line: `flax-lstm train | evaluate | predict | trace | bench`.

Results go to the standard output, messages and live progress to the standard error.
JAX and the data libraries are imported by the commands that need them, after the
arguments have been found right.

Exit codes: 0 all done and on disk; 1 the run failed; 2 wrong usage or input;
130 interrupted; 141 nobody reads the output any more; 143 terminated.
"""

import codecs
import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, Positional

from flax_lstm import report
from flax_lstm.bench.options import BenchOptions
from flax_lstm.config import PRESETS, Config, DataConfig, UserError
from flax_lstm.events import EpochDone, Event, Finished, RunStarted, StepDone

if TYPE_CHECKING:
    from flax_lstm.run import Prediction, Run

FAILED, USAGE, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 130, 141, 143
CHUNK = 1024
"""Texts predicted at a time, so that a stream of any length fits in memory."""
DEMO_TEXTS = (
    "The acting was not at all bad",
    "I wanted to love the film, but I have to regret it",
    "Although the plot was silly, I found the music wonderful",
)
"""Shown after a demo run. In each, the order of the words decides."""

Flag = FlagCreatePairsOff[bool]
PresetName = Literal["default", "tutorial"]
RunFolder = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
Texts = Annotated[
    Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint=""),
]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a configuration starts from; flags are put over it."""

    preset: PresetName = "default"
    """Settings to start from. `tutorial`: the recipe of the StockTwits tutorial."""
    config: Path | None = None
    """A .json or .toml file of settings, put over the preset and under the flags."""
    out: Path | None = None
    """Run folder to create; runs/NAME-1, -2, ... when not given."""
    resume: Flag = False
    """Continue the run in --out, with its settings; --epochs may be raised."""


@dataclasses.dataclass(frozen=True)
class Train(Start):
    """Trains a classifier, tests it, and leaves everything in a run folder.

    Without any flag it trains on the embedded demo corpus of generated sentences.
    """

    quiet: Flag = False
    """Print nothing but the test accuracy."""
    print_config: Flag = False
    """Print the settings that would be used, as --config reads them, and stop."""
    debug: Flag = False
    """Show where an error came from."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["default"]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Tests a trained run on a part of its own data, or on other data."""

    run: RunFolder
    """Run folder."""
    part: Literal["train", "validation", "test"] = "test"
    """Part of the run's own data."""
    data: str | None = None
    """Other data instead, as for train: its test part, or else all of it."""
    text_column: str | None = None
    """Column of the text in --data; found by its name when not given."""
    label_column: str | None = None
    """Column of the label in --data; found by its name when not given."""
    format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object."""
    debug: Flag = False
    """Show where an error came from."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Scores texts: from the arguments, from a file, or from the standard input.

    A file or the standard input is UTF-8 with one text on each line; an empty line is
    an empty text. One line comes out for each text. A score is between 0 and 1.
    """

    run: RunFolder
    """Run folder."""
    texts: Texts = ()
    """Texts to score. None: read --file, or the standard input."""
    file: Path | None = None
    """File of texts, one on each line."""
    format: Literal["text", "jsonl"] = "text"
    """`text`: score, label, text. `jsonl`: one JSON object on each line."""
    debug: Flag = False
    """Show where an error came from."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Shows how the score of a text moves, word by word, in colour."""

    run: RunFolder
    """Run folder."""
    texts: Texts = ()
    """Texts to trace. None: read the standard input, one text on each line."""
    debug: Flag = False
    """Show where an error came from."""


Command = Train | Evaluate | Predict | Trace | BenchOptions


class Screen(Console):
    """A console without rich's own ideas: no highlighting, wrapping or exit codes."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Leaves the error to `main`."""
        raise  # rich calls this while it handles the BrokenPipeError


class Terminated(BaseException):
    """SIGTERM was received; no `Exception`, so that nothing takes it for an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows little
            stream.reconfigure(errors="backslashreplace")
    try:
        command = parse(argv)
        if command is not None:
            execute(command)
        sys.stdout.flush()  # here, so that a closed pipe shows before the end
    except SystemExit as stop:  # usage, as tyro reports it
        return stop.code if isinstance(stop.code, int) else USAGE
    except UserError as error:
        return _failed(error, USAGE, debug)
    except BrokenPipeError:
        # Python flushes once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        _say("interrupted.")
        return INTERRUPTED
    except Terminated:
        _say("terminated.")
        return TERMINATED
    except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
        return _failed(error, FAILED, debug)
    return 0


def parse(argv: Sequence[str]) -> Command | None:
    """Returns the command with every setting in place, or None if all is done.

    Preset, configuration file and flags are put over each other in this order.

    Raises:
      UserError: If the configuration file is wrong.
      SystemExit: On `--help` (0) and on wrong arguments (2).
    """
    if argv[:1] == ["--version"]:
        print(f"flax-lstm {importlib.metadata.version('flax-lstm')}")
        return None
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
    """Returns the settings that the flags are put over."""
    base = PRESETS[start.preset]
    if start.resume and start.out is not None:
        recorded = start.out / "config.json"
        base = Config.load(recorded) if recorded.exists() else base
    return base if start.config is None else Config.load(start.config, base)


def execute(command: Command) -> None:
    """Does what the command says."""
    quieten_libraries(command.debug)
    match command:
        case Train(print_config=True):
            print(json.dumps(command.settings.to_dict(), indent=2))
        case Train():
            train(command)
        case Evaluate():
            evaluate(command)
        case Predict():
            predict(command)
        case Trace():
            trace(command)
        case BenchOptions():
            from flax_lstm.bench.main import bench

            bench(command, Screen())


def train(command: Train) -> None:
    """Trains, tests, and shows what a person wants to see of it."""
    from flax_lstm import run as runs

    if command.resume and command.out is None:
        raise UserError(
            "--resume needs --out with the folder of the run that it continues."
        )
    out = Screen()
    err = Screen(stderr=True)
    live = report.LiveProgress(out if out.is_terminal else err)
    follow = Follower(out, live, command.quiet)
    shown = contextlib.nullcontext() if command.quiet else live
    try:
        with terminating(follow), shown:
            run = runs.train(
                command.settings, command.out, resume=command.resume, on_event=follow
            )
    except (KeyboardInterrupt, Terminated):
        if follow.folder is not None:
            _say(
                f"the epochs done are kept; `{program()} train --resume --out "
                f"{shlex.quote(str(near(follow.folder)))}` goes on."
            )
        raise
    if command.quiet:
        return
    if command.settings.data.data == "demo":
        show_traces(out, run, DEMO_TEXTS)
    name = program()
    shown_folder = near(run.folder)
    folder = shlex.quote(str(shown_folder))
    out.print(
        f"\nThe run is in {shown_folder}. Try:\n"
        f"  {name} predict {folder} 'not at all bad' 'the film was not good'\n"
        f"  {name} trace {folder} 'I expected to hate it, but I love it'\n"
        f"  {name} evaluate {folder}\n"
        f"or train on texts of your own, in columns named text and label:\n"
        f"  {name} train --data FILE.csv",
        markup=False,
    )


def evaluate(command: Evaluate) -> None:
    """Tests a run."""
    columns = (command.text_column, command.label_column)
    if command.data is None and columns != (None, None):
        raise UserError("--text-column and --label-column are for --data.")
    run = _load(command.run)
    if command.data is None:
        source = command.part
    else:
        source = DataConfig(
            data=command.data,
            text_column=command.text_column,
            label_column=command.label_column,
        )
    metrics = run.evaluate(source)
    if command.format == "json":
        print(json.dumps(metrics, allow_nan=False))
    else:
        print("\n".join(report.metrics_lines(metrics)))


def predict(command: Predict) -> None:
    """Scores texts, a chunk at a time."""
    if command.texts and command.file is not None:
        raise UserError("give texts or --file, not both.")
    run = _load(command.run)
    console = Screen()
    for texts in chunks(texts_of(command.texts, command.file), CHUNK):
        for prediction in run.predict(texts):
            if command.format == "jsonl":
                print(json_line(prediction))
            else:
                console.print(
                    report.prediction_text(
                        prediction.score, prediction.label, prediction.text
                    )
                )


def trace(command: Trace) -> None:
    """Shows running scores."""
    run = _load(command.run)
    show_traces(Screen(), run, texts_of(command.texts, None))


def show_traces(console: Console, run: "Run", texts: Iterable[str]) -> None:
    """Prints the running score of each text."""
    for text in texts:
        console.print()
        console.print(
            report.trace_text(run.trace(text), run.label_names, console.width)
        )


class Follower:
    """Turns the events of a training run into lines and live progress."""

    def __init__(self, out: Console, live: report.LiveProgress, quiet: bool):
        self.out, self.live, self.quiet = out, live, quiet
        self.terminated = False
        self.folder: Path | None = None

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, RunStarted):
            self.folder = event.folder
        if self.terminated:
            raise Terminated
        match event:
            case RunStarted():
                self._print(*report.start_lines(event))
                self._print(f"Run folder: {near(event.folder)}")
                self.live.phase("Compiling")
            case StepDone():
                self.live.step(event)
            case EpochDone():
                self._print(report.epoch_line(event))
            case Finished():
                self._print(*report.finish_lines(event))
                if event.test is not None:
                    accuracy = report.accuracy_line(event.test["accuracy"])
                    self.out.print(accuracy, style="bold", markup=False)

    def _print(self, *lines: str) -> None:
        if not self.quiet:
            for line in lines:
                self.out.print(line, markup=False)


@contextlib.contextmanager
def terminating(follow: Follower) -> Iterator[None]:
    """Lets SIGTERM stop the run after the batch at hand; a second one, at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if follow.terminated:
            os._exit(TERMINATED)
        follow.terminated = True

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def texts_of(given: Sequence[str], path: Path | None) -> Iterator[str]:
    """Yields the texts given, or those of the file, or of the standard input."""
    if given:
        yield from map(argument_text, given)
    elif path is not None:
        try:
            with open(path, "rb") as file:
                yield from lines(file, str(path))
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; expected a file of "
                "texts, one on each line."
            ) from error
    else:
        if sys.stdin.isatty():
            _say("reading texts, one on each line; Ctrl-D ends.")
        yield from lines(sys.stdin.buffer, "the standard input")


def lines(file: IO[bytes], name: str) -> Iterator[str]:
    r"""Yields the lines of a UTF-8 file without their ends (`\n` or `\r\n`).

    Raises:
      UserError: If there is no line, or one holds a NUL byte or is not UTF-8.
    """
    number = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if b"\0" in line:
            raise UserError(
                f"line {number} of {name} holds a NUL byte; expected UTF-8 text. Is it "
                "UTF-16, or not text? `iconv -f UTF-16 -t UTF-8` converts."
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"line {number} of {name} is not UTF-8 (byte {error.start + 1}: "
                f"{line[error.start]:#04x}); convert it, as by "
                "`iconv -f LATIN1 -t UTF-8`."
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")
    if not number:
        raise UserError(f"{name} is empty; expected texts, one on each line.")


def json_line(prediction: "Prediction") -> str:
    """Returns a prediction as JSON; `tokens` is the number of words read."""
    return json.dumps(
        {
            "text": prediction.text,
            "score": prediction.score,
            "label": prediction.label,
            "tokens": len(prediction.tokens),
            "unknown": prediction.unknown,
        },
        ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8"),
        allow_nan=False,
    )


def argument_text(text: str) -> str:
    """Returns a text of the command line.

    Raises:
      UserError: If the bytes given were not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the argument {text!a:.60} is not in the terminal's encoding, UTF-8."
        ) from error
    return text


def chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yields lists of `size` texts and a last one with the rest."""
    while chunk := list(itertools.islice(texts, size)):
        yield chunk


def near(folder: Path) -> Path:
    """Returns the folder as seen from here, where it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def program() -> str:
    """Returns how this command was called, so that what is printed can be pasted."""
    called = sys.argv[0]
    found = shutil.which("flax-lstm")
    if found and Path(called).exists() and Path(found).samefile(called):
        return "flax-lstm"
    is_ours = Path(called).name == "flax-lstm"
    return shlex.quote(called) if is_ours else "flax-lstm"


def quieten_libraries(debug: bool) -> None:
    """Keeps the libraries' notes off the screen; their errors still show."""
    if not debug:
        for name in ("absl", "orbax", "jax", "datasets", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")


def _load(folder: Path) -> "Run":
    from flax_lstm.run import Run

    return Run.load(folder)


def _say(message: str) -> None:
    print(f"flax-lstm: {message}", file=sys.stderr)


def _failed(error: Exception, code: int, debug: bool) -> int:
    """Prints an error as one message and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    _say(f"{error or type(error).__name__}")
    return code
