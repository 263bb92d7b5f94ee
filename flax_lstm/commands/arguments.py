"""The commands and their arguments, one frozen dataclass for each.

A field's docstring is its help text.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from flax_lstm.bench.options import BenchOptions
from flax_lstm.config import PRESETS, Config

Flag = FlagCreatePairsOff[bool]
PresetName = Literal["default", "tutorial"]
RunFolder = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
Texts = Annotated[
    Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint=""),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes that computes."""

    no_compilation_cache: Flag = False
    """Compile anew; compiled programs are otherwise kept for the next command."""
    debug: Flag = False
    """Show where an error came from."""


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
    auto_resume: Flag = False
    """Continue the run in --out if there is one, else start it."""
    cast_dtype: Flag = False
    """With --resume: convert the checkpoint to another --dtype."""


@dataclasses.dataclass(frozen=True)
class Train(Start, Common):
    """Trains a classifier, tests it, and leaves everything in a run folder.

    Without any flag it trains on the embedded demo corpus of generated sentences.
    """

    quiet: Flag = False
    """Print nothing but the test accuracy."""
    distributed: Annotated[str, tyro.conf.arg(metavar="auto|off|HOST:PORT")] = "off"
    """Train with the processes of the cluster that JAX finds, or at this address."""
    process_id: int | None = None
    """Number of this process, from 0, for HOST:PORT; JAX_PROCESS_ID when not given."""
    process_count: int | None = None
    """Number of processes, likewise; JAX_NUM_PROCESSES when not given."""
    print_config: Flag = False
    """Print the settings that would be used, as --config reads them, and stop."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["default"]


@dataclasses.dataclass(frozen=True)
class Evaluate(Common):
    """Tests a trained run on a part of its own data, or on other data."""

    run: RunFolder
    """Run folder."""
    part: Literal["train", "validation", "test"] | None = None
    """Part of the run's own data; test when neither this nor --data is given. With
    --data, that is where it now lies."""
    data: str | None = None
    """Other data instead, as for train: its test part, or else all of it."""
    text_column: str | None = None
    """Column of the text in --data; found by its name when not given."""
    label_column: str | None = None
    """Column of the label in --data; found by its name when not given."""
    format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object."""


@dataclasses.dataclass(frozen=True)
class Predict(Common):
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


@dataclasses.dataclass(frozen=True)
class Trace(Common):
    """Shows how the score of a text moves, word by word, in colour."""

    run: RunFolder
    """Run folder."""
    texts: Texts = ()
    """Texts to trace. None: read the standard input, one text on each line."""


Command = Train | Evaluate | Predict | Trace | BenchOptions
