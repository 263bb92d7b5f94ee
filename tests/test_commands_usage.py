"""Wrong usage in one line."""

import sys

import pytest

from flax_lstm.commands.usage import check_given_once, one_line
from flax_lstm.config import UserError

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


def test_a_box_becomes_the_text_of_an_error(capsys):
    with pytest.raises(UserError, match=r"^no option --x\. Use --y$"), one_line():
        ends(2, BOX, sys.stderr)
    assert capsys.readouterr().err == ""


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


def test_values_and_texts_may_repeat():
    check_given_once(["x", "x", "-a", "-a", "--a", "1", "--b", "1", "--", "--a", "--a"])
