"""Wrong usage in one line."""

import sys

import pytest

from flax_lstm.commands.usage import check_given_once, check_out, flat, one_line
from flax_lstm.config import UserError

ASCII = (
    " Bad         \n"
    " ----------- \n"
    "  no option  \n"
    "  --x        \n"
    " ----------- \n"
    "  Use --y.   \n"
    "             \n"
)
"""Drawn where the terminal's encoding is not called utf-8."""
BOX = (
    "\x1b[31m╭─ Bad ───────╮\x1b[0m\n"
    "│ no option   │\n"
    "│ --x         │\n"
    "│ ─────────── │\n"
    "│ Use --y.    │\n"
    "╰─────────────╯\n"
)


def ends(code, said, stream):
    print(said, file=stream)
    sys.exit(code)


@pytest.mark.parametrize("box", [BOX, ASCII], ids=["utf-8", "ascii"])
def test_a_box_becomes_the_text_of_an_error(capsys, box):
    with pytest.raises(UserError, match=r"^no option --x\. Use --y$"), one_line():
        ends(2, box, sys.stderr)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["train", "a.csv"], "options: a.csv (data are given by --data a.csv). Run"),
        (["train", "--x", "1"], "options: --x, 1. Run flax-lstm train --help"),
        (["predict", "--x"], "options: --x. Run flax-lstm predict --help"),
        (["--x"], "options: --x. Run flax-lstm --help"),
    ],
)
def test_a_message_points_to_the_help_of_its_command(argv, want):
    said = (
        f"Unrecognized options: {', '.join(argv[-1:] if len(argv) < 3 else argv[1:])}"
    )
    with pytest.raises(UserError) as refused, one_line(argv):
        ends(
            2,
            f"╭─ Bad ─╮\n│ {said}.  │\n│ ──── │\n│ Run flax-lstm --help │",
            sys.stderr,
        )
    assert want in str(refused.value)


def test_a_message_without_a_box_stays_as_it_is():
    assert flat("no option --x\n") == "no option --x"


def test_help_and_what_is_said_besides_pass_through(capsys):
    with pytest.raises(SystemExit), one_line():
        ends(0, "help", sys.stdout)
    with one_line():
        print("a warning", file=sys.stderr)
    assert capsys.readouterr() == ("help\n", "a warning\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--a", "1", "--a", "2"], "--a was given more than once"),
        (["--a-b=1", "--a_b", "1"], "--a-b was given more than once"),
        (["--a", "--no-a"], "--a and --no-a contradict"),
    ],
)
def test_a_flag_given_twice_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        check_given_once(argv)


def test_a_text_may_look_like_an_empty_folder():
    check_out(["predict", "run", "--", "--out", ""])


def test_values_and_texts_may_repeat():
    check_given_once(["x", "x", "-a", "-a", "--a", "1", "--b", "1", "--", "--a", "--a"])
