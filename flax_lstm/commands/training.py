"""`train`: what a person sees of a run, and how it is stopped."""

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from flax_lstm import distributed, environment, report
from flax_lstm.commands.answers import show_traces
from flax_lstm.commands.arguments import Train
from flax_lstm.commands.signals import listening
from flax_lstm.commands.terminal import Screen, near, program
from flax_lstm.config import UserError
from flax_lstm.events import EpochDone, Event, Finished, RunStarted, StepDone

DEMO_TEXTS = (
    "The acting was not at all bad",
    "I wanted to love the film, but I have to regret it",
    "Although the plot was silly, I found the music wonderful",
)
"""Shown after a demo run. In each, the order of the words decides."""


def train(command: Train, started: float | None = None) -> None:
    """Trains, tests, and shows what a person wants to see of it.

    Args:
      command: What was asked for.
      started: When the command started, by `time.perf_counter`.
    """
    from flax_lstm import run as runs

    resume: bool | Literal["auto"] = "auto" if command.auto_resume else command.resume
    if resume and command.out is None:
        raise UserError(
            "--resume needs --out with the folder of the run that it continues; so "
            "does --auto-resume."
        )
    if command.cast_dtype and not resume:
        raise UserError("--cast-dtype is for --resume: it converts a checkpoint.")
    if command.distributed != "off":
        keep_output_apart()
    distributed.join(command.distributed, command.process_id, command.process_count)
    environment.check_devices()
    quiet = command.quiet or not distributed.is_first()
    out = Screen()
    err = Screen(stderr=True)
    live = report.LiveProgress(out if out.is_terminal else err)
    follow = Follower(out, live, quiet)
    shown = contextlib.nullcontext() if quiet else live
    stop = runs.Stop()
    try:
        with listening(stop), shown:
            run = runs.train(
                command.settings,
                command.out,
                resume=resume,
                cast_dtype=command.cast_dtype,
                on_event=follow,
                stop=stop,
                started=started,
            )
    except runs.Stopped as stopped:
        if follow.folder is None:
            raise
        folder = shlex.quote(str(near(follow.folder)))
        raise runs.Stopped(
            stopped.reason,
            f"{stopped}; `{program()} train --resume --out {folder}` goes on",
        ) from None
    if quiet:
        return
    demo = command.settings.data.data == "demo"
    if demo:
        show_traces(out, run, DEMO_TEXTS)
    name = program()
    shown_folder = near(run.folder)
    folder = shlex.quote(str(shown_folder))
    out.print(
        f"\nThe run is in {shown_folder}. Try:\n"
        f"  {name} predict {folder} 'not at all bad' 'the film was not good'\n"
        f"  {name} trace {folder} 'I expected to hate it, but I love it'\n"
        f"  {name} evaluate {folder}",
        markup=False,
    )
    if demo:
        out.print(
            "or train on texts of your own, in columns named text and label:\n"
            f"  {name} train --data FILE.csv",
            markup=False,
        )


def print_config(command: Train) -> None:
    """Prints the settings, unless training would refuse them; as `--config` reads them.

    Raises:
      UserError: If it would.
    """
    from flax_lstm.run import check_request

    more = command.distributed != "off"
    settings = check_request(command.settings, more_to_join=more)
    print(json.dumps(settings.to_dict(), indent=2))


def keep_output_apart() -> None:
    """Gives what libraries in C++ print (Gloo, of its ranks) to the standard error."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(  # noqa: SIM115 for the rest of the process
        ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )


class Follower:
    """Turns the events of a training run into lines and live progress."""

    def __init__(self, out: Console, live: report.LiveProgress, quiet: bool):
        self.out, self.live, self.quiet = out, live, quiet
        self.folder: Path | None = None

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, RunStarted):
            self.folder = event.folder
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
