"""Where labelled text comes from, read into rows that say where they were read.

Parquet files and the Hugging Face Hub go through `datasets`; formats.py says why csv
and json do not. Nothing but a Hub name touches the network, and no cache outlives the
reading of a local file.
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_lstm import demo_corpus
from flax_lstm.config import DataConfig, UserError
from flax_lstm.formats import decode, parse_csv, parse_json
from flax_lstm.labels import shown
from flax_lstm.parquet import check_memory, quiet_datasets, read_parquet

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TEXT_NAMES = ("text", "review", "sentence", "message", "content", "comment", "tweet")
LABEL_NAMES = ("label", "labels", "sentiment", "target", "class", "polarity")
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts, raw labels and groups of one part, in the order of the source.

    `where[i]` names row i for messages.
    """

    texts: Sequence[str]
    labels: Sequence[object]
    groups: Sequence[str] | None
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read: the parts it has (`train` at least), and from where."""

    parts: dict[str, Rows]
    description: str
    sha256: str
    notes: tuple[str, ...] = ()


class Where(Sequence):
    """Names rows as "row 3 of FILE" when asked, without holding a million strings."""

    def __init__(self, origin: str, size: int, unit: str = "row", numbers=None):
        self._origin, self._size = origin, size
        self._unit, self._numbers = unit, numbers

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row):
        number = row + 1 if self._numbers is None else self._numbers[row]
        return f"{self._unit} {number} of {self._origin}"


def read(name: str, config: DataConfig) -> Source:
    """Reads `demo`, a file, a folder in aclImdb form, or a Hugging Face dataset.

    Args:
      name: What to read; a path if one exists under this name.
      config: Names of the columns.

    Raises:
      UserError: If it cannot be found, cannot be read, or lacks what is needed.
    """
    path = Path(name).expanduser()
    if name == "demo":
        source = _read_demo(config)
    elif path.is_dir():
        source = _read_folder(path, config)
    elif path.is_file():
        source = _read_file(path, config)
    elif _HUB_NAME.fullmatch(name) and path.suffix.lower() not in SUFFIXES:
        source = _read_hub(name, config)
    else:
        raise UserError(
            f"no file or folder {name}{_neighbours(path)}. Expected `demo`, a "
            f"{', '.join(SUFFIXES)} file, a folder with train/pos and train/neg, or "
            "the name of a Hugging Face dataset (owner/name)."
        )
    if not any(len(rows) for rows in source.parts.values()):
        raise UserError(f"no rows in {source.description}; nothing to learn from.")
    return source


def _neighbours(path: Path) -> str:
    """Returns the files that are there instead, the likest first, for a message."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES)
    except OSError:
        return f"; there is no folder {path.parent} either"
    like = difflib.get_close_matches(path.name, names, 3) or names[:3]
    more = ", ..." if len(names) > len(like) else ""
    return f"; {path.parent} has {', '.join(like)}{more}" if like else ""


def _read_demo(config: DataConfig) -> Source:
    if config.group_column:
        raise UserError("the demo corpus has no columns; leave out --group-column.")
    found = demo_corpus.sentences()
    texts = [sentence.text for sentence in found]
    rows = Rows(
        texts,
        ["positive" if sentence.label else "negative" for sentence in found],
        None,
        Where("the demo corpus", len(found)),
    )
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Source({"train": rows}, "the demo corpus (generated)", digest)


def _read_file(path: Path, config: DataConfig) -> Source:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path} has the type {suffix or '(none)'!r}; expected one of "
            f"{', '.join(SUFFIXES)}. Convert it, or rename it to what it is."
        )
    try:
        check_memory(path, path.stat().st_size)
        if suffix == ".parquet":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            rows = _rows_of_dataset(read_parquet(path), str(path), config)
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            rows = _rows_of_text(content, path, config)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return Source({"train": rows}, str(path), digest)


def _rows_of_text(content: bytes, path: Path, config: DataConfig) -> Rows:
    text = decode(content, path)
    if not text.strip():
        raise UserError(f"no rows in {path}: the file is empty.")
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        columns, numbers, unit = parse_json(text, path)
    else:
        del text  # parsed from the bytes, with a hundred MB less at a time
        columns, numbers, unit = parse_csv(content, path, suffix == ".tsv")
    where = Where(str(path), len(numbers), unit, numbers)
    return _rows(columns, where, str(path), config)


def _read_folder(path: Path, config: DataConfig) -> Source:
    """Reads `train/pos`, `train/neg`, and `test/` or `validation/` the same."""
    if config.group_column:
        raise UserError(f"the folder {path} has no columns; leave out --group-column.")
    parts, digest = {}, hashlib.sha256()
    for part, folder in [("train", path / "train"), ("test", path / "test")]:
        if part == "train" and not folder.is_dir() and (path / "pos").is_dir():
            folder = path
        if part == "test" and not folder.is_dir():
            continue
        texts, labels, names = [], [], []
        for label in ("neg", "pos"):
            if not (folder / label).is_dir():
                raise UserError(
                    f"no folder {folder / label}; expected {path}/train/pos and "
                    f"{path}/train/neg (and test/ the same) with one text per .txt "
                    "file."
                )
            for file in sorted((folder / label).glob("*.txt")):
                try:
                    content = file.read_bytes()
                except OSError as error:
                    raise UserError(f"cannot read {file}: {error}") from error
                digest.update(f"{file.relative_to(path)}\0{len(content)}\0".encode())
                digest.update(content)
                texts.append(decode(content, file))
                labels.append(label)
                names.append(str(file))
        parts[part] = Rows(texts, labels, None, names)
    return Source(parts, str(path), digest.hexdigest())


def _read_hub(name: str, config: DataConfig) -> Source:
    import datasets

    try:
        with quiet_datasets(progress=True):
            found: Any = datasets.load_dataset(name)
    except Exception as error:  # network, HTTP, missing name, unknown configuration ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name!r} is no file or folder here, and cannot be read as a Hugging Face "
            f"dataset: {lines[0]} Check the path or the name, and the network."
        ) from error
    parts, notes = {}, []
    for part, known in PART_NAMES.items():
        for split in known:
            if split not in found or part in parts:
                continue
            origin = f"{name} ({split})"
            rows = _rows_of_dataset(found[split], origin, config)
            if rows.labels and all(label in (None, -1) for label in rows.labels):
                notes.append(f"{origin} has no labels and is not used")
            else:
                parts[part] = rows
    if "train" not in parts:
        raise UserError(
            f"the dataset {name} has no labelled training part; its parts are "
            f"{sorted(found)}."
        )
    prints = [getattr(found[split], "_fingerprint", "") for split in sorted(found)]
    digest = hashlib.sha256("\n".join(map(str, prints)).encode()).hexdigest()
    return Source(parts, f"Hugging Face dataset {name}", digest, tuple(notes))


def _rows_of_dataset(dataset: Any, origin: str, config: DataConfig) -> Rows:
    """Takes the columns out of a `datasets.Dataset`, classes by their names."""
    wanted = _chosen(dataset.column_names, origin, config)
    columns = {}
    for name in filter(None, wanted):
        try:
            columns[name] = dataset.data.column(name).to_pylist()
        except (UnicodeDecodeError, ArithmeticError) as error:  # a time out of range
            raise UserError(
                f"{origin}: column {name!r} is damaged: {error}. Is the file complete?"
            ) from error
    names = getattr(dataset.features[wanted[1]], "names", None)
    if names:
        columns[wanted[1]] = [
            names[v] if isinstance(v, int) and v >= 0 else v for v in columns[wanted[1]]
        ]
    return _rows(columns, Where(origin, len(dataset)), origin, config)


def _chosen(
    names: Sequence[str], origin: str, config: DataConfig
) -> tuple[str, str, str | None]:
    """Returns the columns of the text, of the label and of the group."""
    text = _column(names, config.text_column, TEXT_NAMES, origin, "text")
    label = _column(names, config.label_column, LABEL_NAMES, origin, "label")
    if text == label:
        raise UserError(f"{origin}: text and label are both column {text!r}.")
    group = config.group_column
    if group is not None:
        group = _column(names, group, (), origin, "group")
    return text, label, group


def _column(
    names: Sequence[str],
    given: str | None,
    usual: Sequence[str],
    origin: str,
    role: str,
) -> str:
    columns = f"columns are {', '.join(map(repr, names))}"
    if given is not None:
        if given in names:
            return given
        raise UserError(
            f"{origin} has no column {given!r}; {columns}. Correct --{role}-column."
        )
    found = [name for name in names if name.strip().lower() in usual]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{origin} has several columns that could be the {role}: "
            f"{', '.join(map(repr, found))}. Choose one with --{role}-column."
        )
    advice = f"Choose one with --{role}-column."
    for mark in ";\t|":
        if len(names) == 1 and mark in names[0]:
            advice = (
                f"Are its fields separated by {mark!r}? Expected commas, or tabs in a "
                ".tsv file."
            )
    raise UserError(
        f"{origin} has no column for the {role}: none is called "
        f"{', '.join(usual)}; {columns}. {advice}"
    )


def _rows(
    columns: dict[str, list[Any]],
    where: Sequence[str],
    origin: str,
    config: DataConfig,
) -> Rows:
    text, label, group = _chosen(list(columns), origin, config)
    for row, value in enumerate(columns[text]):
        if not isinstance(value, str):
            raise UserError(
                f"{where[row]} has {shown(value)} for a text in column {text!r}; "
                "expected a string. Correct the row or remove it."
            )
    groups = None
    if group is not None:
        for row, value in enumerate(columns[group]):
            if value is None or value == "":
                raise UserError(
                    f"{where[row]} has no value in the group column {group!r}."
                )
        groups = [str(value) for value in columns[group]]
    return Rows(columns[text], columns[label], groups, where)
