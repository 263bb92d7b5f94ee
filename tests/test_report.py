"""What a person looks at, read back as text and as styles."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from flax_lstm import report
from flax_lstm.config import Config
from flax_lstm.events import EpochDone, Finished, RunStarted, StepDone

NAMES = ("negative", "positive")


def terminal(**options) -> Console:
    """A pretend colour terminal, 80 columns wide, whose output can be read."""
    usual = {"force_terminal": True, "color_system": "truecolor", "width": 80}
    return Console(file=io.StringIO(), _environ={}, **usual | options)


def drawn(renderable, **options) -> str:
    console = terminal(**options)
    console.print(renderable)
    return console.file.getvalue()


def step_done(epoch, epochs, batch, batches, *, loss=0.5, tokens=0, seconds=0.0):
    return StepDone(epoch, epochs, batch, batches, loss, 0.75, 0.1, tokens, seconds)


def epoch_done(**changes) -> EpochDone:
    zeros = {
        f.name: (f.type if f.type in (int, float, bool) else float)()
        for f in dataclasses.fields(EpochDone)
    }
    return EpochDone(**zeros | changes)


def test_an_epoch_is_written_as_the_tutorial_writes_it():
    """The line is the tutorial's published one, character by character."""
    event = epoch_done(
        epoch=1,
        epochs=50,
        batch=303,
        batches=303,
        train_loss=0.2471,
        train_accuracy=0.5619,
        validation_accuracy=0.57849,
    )
    assert report.epoch_line(event) == (
        "Epoch: 1/50 Batch: 303/303 Train Loss: 0.247 Train Accuracy: 0.562 "
        "Val Accuracy: 0.578"
    )
    assert report.accuracy_line(0.7168) == "Test Accuracy: 0.717"


def test_an_epoch_without_validation_says_so():
    line = report.epoch_line(epoch_done(validation_accuracy=None))
    assert line.endswith("Val Accuracy: none")


def test_every_word_stands_above_its_score():
    steps = [("not", 0.31), ("at", 0.3), ("unbelievably", 0.42), ("bad", 0.88)]
    words, scores, verdict = report.trace_text(steps, NAMES).plain.split("\n")
    for word, score in steps:
        assert scores.find(f"{score:.2f}") == words.find(word)
    assert verdict == "= positive 0.88"


def test_a_long_trace_is_broken_between_words():
    steps = [(f"word{n}", n / 50) for n in range(50)]
    rows = report.trace_text(steps, NAMES, width=40).plain.split("\n")
    assert max(map(len, rows)) <= 40
    assert " ".join(rows[:-1:3]).split() == [word for word, _ in steps]
    assert " ".join(rows[1:-1:3]).split() == [f"{s:.2f}" for _, s in steps]


def test_wide_characters_count_two_columns():
    """Each of these fills two cells of a terminal, so 4 need no filling up."""
    words, _, _ = report.trace_text([("好好", 0.5), ("b", 0.5)], NAMES).plain.split(
        "\n"
    )
    assert words == "好好  b"


def test_a_very_long_word_is_cut():
    words, _, _ = report.trace_text([("x" * 10_000, 0.5)], NAMES).plain.split("\n")
    assert words == "x" * 23 + "…"


def test_an_empty_text_has_a_trace():
    assert report.trace_text([], NAMES).plain == "(no words)"


def test_a_text_cannot_steer_the_terminal():
    """ESC [2J would clear the screen, ESC ] 0 set its title, U+202E turn the text."""
    evil = "\x1b[2J\x1b]0;x\x07\u202e"
    for shown in (
        report.trace_text([(evil, 0.5)], NAMES),
        report.prediction_text(0.5, "no", evil),
    ):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown.plain)


@pytest.mark.parametrize("score", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_color_tells_the_side_and_the_text_is_readable(score):
    red, green, blue = report.score_color(score)
    assert (red > green) == (score <= 0.5)
    # WCAG 2 contrast of black text: (L + 0.05) / 0.05 must reach 4.5.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (red / 255, green / 255, blue / 255)
    ]
    luminance = sum(
        a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )
    assert (luminance + 0.05) / 0.05 >= 4.5


def test_color_appears_in_a_terminal_and_nowhere_else():
    trace = report.trace_text([("bad", 0.1)], NAMES)
    assert "\x1b[30;48;2;" in drawn(trace)
    assert "48;2" not in drawn(trace, no_color=True)
    plain = drawn(trace, force_terminal=False, color_system="auto")
    assert plain == "bad\n0.10\n= negative 0.10\n"


def foot(live: report.LiveProgress, console: Console) -> list[str]:
    """The lines of the live display as they stand."""
    lines = console.render_lines(live.progress, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def test_the_speed_and_the_time_left_forget_the_compilation():
    """100 s to the first batch, then one a second with 1200 words each.

    At batch 31 of 2 epochs of 40, 49 batches are left, which take 49 s.
    """
    console = terminal()
    with report.LiveProgress(console) as live:
        for batch in range(1, 32):
            live.step(
                step_done(1, 2, batch, 40, tokens=1200 * batch, seconds=99.0 + batch)
            )
        (line,) = foot(live, console)
    assert line.startswith("Epoch 1/2 ")
    assert line.rstrip().endswith(
        "31/40  loss 0.500  accuracy 0.750  1.2k tokens/s  0:49 left"
    )


def test_live_progress_draws_in_a_terminal_only():
    for is_terminal in (True, False):
        console = terminal(force_terminal=is_terminal)
        with report.LiveProgress(console) as live:
            live.step(step_done(1, 1, 1, 1))
        assert bool(console.file.getvalue()) == is_terminal


@pytest.mark.parametrize("width", [80, 100, 200])
def test_live_progress_fits_one_line(width):
    console = terminal(width=width)
    with report.LiveProgress(console) as live:
        for step in (step_done(1, 50, 1, 303), step_done(9, 50, 99, 303, seconds=9e4)):
            live.step(step)
        assert len(foot(live, console)) == 1


def test_numbers_are_short():
    assert report.compact(999) == "999"
    assert report.compact(1_240) == "1.2k"
    assert report.compact(999_499) == "999k"
    assert report.compact(12_345_678) == "12.3M"
    assert report.clock(3599.6) == "1:00:00"


def finished(**changes) -> Finished:
    values = dict(folder=Path(), test=None, tested_epoch=2, best_epoch=2, epochs_done=3)
    values |= dict(stopped_early=False, seconds=75.0, wait_share=0.004)
    values |= dict(startup_seconds=5.25, startup_compile_seconds=1.96)
    values |= dict(startup_import_seconds=2.04, startup_data_seconds=0.25)
    return Finished(**values | changes)


@pytest.mark.parametrize(
    ("devices", "told"),
    [(["cpu"], "on cpu"), (["TPU v4"] * 8 + ["TPU v3"], "on 8 x TPU v4, TPU v3")],
)
def test_devices_of_one_kind_are_counted(devices, told):
    event = RunStarted(Path(), Config(), {}, 2, 1, 1_000, tuple(devices), first_epoch=1)
    assert report.start_lines(event)[-1] == (
        f"Model: 1,000 parameters, LSTM layers 128, 64; {told}"
    )


def test_the_end_tells_the_start_and_the_wait_for_input():
    done, start, wait = report.finish_lines(finished())
    assert done == "Training done: 3 epochs in 1:15. Restored epoch 2 for the test."
    assert start == (
        "First step after 5.2 s: imports 2.0 s, data 0.2 s, compilation 2.0 s."
    )
    assert wait == "Input wait 0.4% of the training time."


def test_a_run_that_had_no_step_left_tells_no_start():
    assert len(report.finish_lines(finished(startup_seconds=None))) == 1


def test_what_a_person_should_know_of_the_data_is_told_and_no_more():
    plain = {
        "rows": {"train": 10, "test": 4},
        "labels": {"negative": "bad", "positive": "good", "rule": "known words"},
        "classes": {"train": {"bad": 5, "good": 5}, "test": {"bad": 1, "good": 3}},
        "rows_also_in": {"test": {"train": 0}},
        "truncated": {"train": 0, "test": 0},
        "empty_texts": {"train": 0, "test": 0},
        "dropped_empty": 0,
        "groups_in_several_parts": 0,
        "notes": [],
    }
    usual = [
        "Data: FILE (train 10, test 4)",
        "Labels: bad = 0, good = 1 (good: train 50.0%, test 75.0%)",
    ]
    assert report.data_lines("FILE", plain) == usual
    odd = {
        "rows_also_in": {"validation": {"train": 0}, "test": {"train": 3, "v": 1}},
        "truncated": {"train": 2, "test": 1},
        "empty_texts": {"train": 0, "test": 1},
        "dropped_empty": 6,
        "groups_in_several_parts": 7,
        "notes": ["something else"],
    }
    assert report.data_lines("FILE", plain | odd) == [
        *usual,
        "Note: of the 4 test rows, 3 in train and 1 in v as well, word for word",
        "Note: 2 train, 1 test rows cut to --max-length",
        "Note: 1 test rows without any word",
        "Note: 6 rows without any word left out",
        "Note: 7 groups have rows in more than one part",
        "Note: something else",
    ]
    guessed = plain | {"labels": plain["labels"] | {"rule": "alphabetical order"}}
    note = "Note: good = 1 by alphabetical order"
    assert report.data_lines("FILE", guessed) == [*usual, note]
    numbers = plain | {
        "labels": {"negative": "0", "positive": "1", "rule": "the larger"},
        "classes": {"train": {"0": 5, "1": 5}, "test": {"0": 3, "1": 1}},
    }
    line = "Labels: 0, 1 (1: train 50.0%, test 25.0%)"
    assert report.data_lines("FILE", numbers)[1] == line
    assert report.data_lines("demo", {}) == ["Data: demo"]
