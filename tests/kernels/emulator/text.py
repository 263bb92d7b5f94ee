"""Reads PTX, the assembly language of NVIDIA's GPUs, as far as compilers write it here.

A statement is an instruction, a label or a directive. Names that an inner `{ ... }`
declares, registers and labels, hold in it alone; they are made unique by its number.
"""

import re
from typing import Any, NamedTuple

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LABEL = re.compile(r"\s*([$A-Za-z_][\w$]*)\s*:(?!:)")
DECLARED = re.compile(r"\.reg\s+\.\w+\s+([^;<]+);")
GUARD = re.compile(r"@(!?)([%$\w]+)\s+")
# What stands alone on its line, without a semicolon.
LINES = re.compile(r"^\s*\.(loc|file|section|pragma)\b[^\n]*$", re.MULTILINE)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: Such as `add`.
      kinds: What follows its name behind dots.
      operands: Their texts; of one in braces, a tuple of them.
      guard: The predicate that it hangs on, or "".
      negated: Whether it runs where the predicate is false.
      text: All of it, for messages.
    """

    name: str
    kinds: tuple[str, ...]
    operands: tuple[Any, ...]
    guard: str
    negated: bool
    text: str


class Program(NamedTuple):
    """One kernel.

    Attributes:
      parameters: Name and bytes of each parameter.
      instructions: All of them.
      labels: The instruction that each label stands before.
    """

    parameters: list[tuple[str, int]]
    instructions: list[Instruction]
    labels: dict[str, int]


def operands(text: str) -> tuple[Any, ...]:
    """Splits at the commas that no bracket or brace holds."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text + ","):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return tuple(
        tuple(name.strip() for name in part[1:-1].split(","))
        if part.startswith("{")
        else part
        for part in parts
        if part
    )


def instruction(text: str) -> Instruction:
    guard, negated, rest = "", False, text
    if found := GUARD.match(text):
        guard, negated, rest = found[2], bool(found[1]), text[found.end() :]
    name, _, arguments = rest.strip().partition(" ")
    first, *kinds = name.split(".")
    return Instruction(
        first, tuple(kinds), operands(arguments.strip()), guard, negated, text
    )


def closing(text: str, opened: int) -> int:
    """Returns where the brace is closed that is opened there."""
    depth, place = 0, opened
    while True:
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
        place += 1


def with_own_names(body: str) -> str:
    """Makes the names unique that inner braces declare."""
    scopes = list(re.finditer(r"(?<=[;:}])\s*\{(?=\s*\.reg)", body))
    for number, opened in reversed(list(enumerate(scopes))):
        end = closing(body, opened.end() - 1)
        inner = body[opened.end() : end]
        names = ",".join(DECLARED.findall(inner)).split(",")
        names += re.findall(r"(?<![\w:])(\w+)\s*:(?!:)", inner)
        for name in {name.strip() for name in names}:
            inner = re.sub(rf"(?<![\w%$.]){name}\b", f"{name}${number}", inner)
        body = body[: opened.start()] + " " + inner + " " + body[end + 1 :]
    return body


def program(ptx: str) -> Program:
    """Reads a listing of one kernel.

    Raises:
      ValueError: If it has another number of kernels.
    """
    ptx = LINES.sub("", COMMENT.sub("", ptx))
    found = list(re.finditer(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{", ptx, re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"a listing of one kernel is wanted; got {len(found)}")
    heads, start = found[0][1], found[0].end()
    body = ptx[start : closing(ptx, start - 1)]
    parameters = []
    for head in heads.split(","):
        name, _, size = head.strip().split()[-1].partition("[")
        parameters.append((name, int(size.rstrip("]")) if size else 8))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in with_own_names(";" + body)[1:].split(";"):
        while named := LABEL.match(statement):
            labels[named[1]] = len(instructions)
            statement = statement[named.end() :]
        text = " ".join(statement.split())
        if text and not text.startswith("."):
            instructions.append(instruction(text))
    return Program(parameters, instructions, labels)
