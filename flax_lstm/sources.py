"""Where labelled text comes from, read into rows that say where they were read.

Parquet files and the Hugging Face Hub go through `datasets`; formats.py says why csv
and json do not. Nothing but a Hub name touches the network, and no cache outlives the
reading of a local file.
"""

import dataclasses
import difflib
import hashlib
import re
from pathlib import Path
from typing import Any

from flax_lstm import demo_corpus
from flax_lstm.columns import Rows, Where, chosen, rows_of
from flax_lstm.config import DataConfig, UserError
from flax_lstm.formats import decode, parse_csv, parse_json
from flax_lstm.parquet import (
    check_memory,
    quiet_datasets,
    read_parquet,
    read_parquet_part,
)
from flax_lstm.shared_files import read_stretch
from flax_lstm.sharing import ALONE, Share
from flax_lstm.stretches import common_digest, read_errors
from flax_lstm.text_folder import PART_NAMES, read_text_folder

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
OTHER_SUFFIXES = (
    *(".txt", ".xml", ".html", ".pdf", ".xls", ".xlsx", ".ods", ".ndjson", ".arrow"),
    *(".feather", ".pkl", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar", ".7z"),
)
"""Of files as well: who gives such a name that is not there mistook a path."""
EXPECTED = (
    f"expected `demo`, a {', '.join(SUFFIXES)} file, a folder with train/pos and "
    "train/neg, or the name of a Hugging Face dataset (owner/name)."
)
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read: the parts it has (`train` at least), and from where."""

    parts: dict[str, Rows]
    description: str
    sha256: str
    notes: tuple[str, ...] = ()


def read(name: str, config: DataConfig, share: Share = ALONE) -> Source:
    """Reads `demo`, a file, a folder in aclImdb form, or a Hugging Face dataset.

    Args:
      name: What to read; a path if one exists under this name.
      config: Names of the columns.
      share: Which stretch of the rows of each part to read; all when alone. Else all
        processes must call this.

    Raises:
      UserError: If it cannot be found, cannot be read, or lacks what is needed.
    """
    path = Path(name).expanduser()
    with share.together(), read_errors(path):
        kind = _kind(name, path)
    share.agree(data_is=kind)
    if kind == "demo":
        source = _read_demo(config, share)
    elif kind == "folder":
        source = Source(*read_text_folder(path, config, share))
    elif kind == "file":
        source = _read_file(path, config, share)
    else:
        source = _read_hub(name, config, share)
    if not sum(share.gather(sum(map(len, source.parts.values())))):
        raise UserError(f"no rows in {source.description}.")
    return source


def _kind(name: str, path: Path) -> str:
    if not name.strip():  # Path("") is the folder where one is
        raise UserError(f"the name of the data is empty; {EXPECTED}")
    if name == "demo":
        return "demo"
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "file"
    suffix = path.suffix.lower()
    if _HUB_NAME.fullmatch(name) and suffix not in SUFFIXES + OTHER_SUFFIXES:
        return "dataset of the Hub"
    raise UserError(f"no file or folder {name}{_neighbours(path)}; {EXPECTED}")


def _neighbours(path: Path) -> str:
    """Returns the files that are there instead, the likest first, for a message."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES)
    except OSError:
        return f"; there is no folder {path.parent} either"
    like = difflib.get_close_matches(path.name, names, 3) or names[:3]
    more = ", ..." if len(names) > len(like) else ""
    return f"; {path.parent} has {', '.join(like)}{more}" if like else ""


def _read_demo(config: DataConfig, share: Share) -> Source:
    with share.together():
        if config.group_column:
            raise UserError("the demo corpus has no columns; leave out --group-column.")
    found = demo_corpus.sentences()
    texts = [sentence.text for sentence in found]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    mine = share.stretch(len(found))
    rows = Rows(
        texts[mine],
        ["positive" if sentence.label else "negative" for sentence in found[mine]],
        None,
        Where("the demo corpus", range(1, len(found) + 1)[mine]),
    )
    return Source({"train": rows}, "the demo corpus (generated)", digest)


def _read_file(path: Path, config: DataConfig, share: Share) -> Source:
    suffix = path.suffix.lower()
    with share.together():
        if suffix not in SUFFIXES:
            raise UserError(
                f"{path} has the type {suffix or '(none)'!r}; expected one of "
                f"{', '.join(SUFFIXES)}. Convert it, or rename it to what it is."
            )
    if share.whole:
        with read_errors(path):
            rows, digest = _read_whole_file(path, config)
    elif suffix == ".parquet":
        with share.together(), read_errors(path):
            part = read_parquet_part(path, share)
            rows = _rows_of_dataset(part.dataset, str(path), config, part.first)
        digest = common_digest(path, part.start, part.stop, share, gaps=True)
    else:
        columns, where, digest = read_stretch(path, share)
        with share.together():
            rows = rows_of(columns, where, str(path), config)
    return Source({"train": rows}, str(path), digest)


def _read_whole_file(path: Path, config: DataConfig) -> tuple[Rows, str]:
    """Returns the rows of a file, and its SHA-256."""
    check_memory(path, path.stat().st_size)
    if path.suffix.lower() == ".parquet":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _rows_of_dataset(read_parquet(path), str(path), config), digest
    content = path.read_bytes()
    return _rows_of_text(content, path, config), hashlib.sha256(content).hexdigest()


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
    return rows_of(columns, Where(str(path), numbers, unit), str(path), config)


def _read_hub(name: str, config: DataConfig, share: Share) -> Source:
    import datasets

    with share.together():
        try:
            with quiet_datasets(progress=share.process == 0):
                found: Any = datasets.load_dataset(name)
        except Exception as error:  # network, HTTP, missing name, unknown configuration
            lines = str(error).strip().splitlines() or [type(error).__name__]
            cause = lines[0].rstrip(".")
            raise UserError(
                f"{name!r} is no file or folder here, and cannot be read as a Hugging "
                f"Face dataset: {cause}. Check the path or the name, and the network."
            ) from error
    share.agree(parts={split: len(found[split]) for split in sorted(found)})
    parts, notes = {}, []
    for part, known in PART_NAMES.items():
        for split in known:
            if split not in found or part in parts:
                continue
            origin = f"{name} ({split})"
            with share.together():
                mine = share.stretch(len(found[split]))
                some = found[split]
                if not share.whole:
                    some = some.select(range(mine.start, mine.stop))
                rows = _rows_of_dataset(some, origin, config, mine.start)
                without = all(label in (None, -1) for label in rows.labels)
            if len(found[split]) and all(share.gather(without)):
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


def _rows_of_dataset(
    dataset: Any, origin: str, config: DataConfig, first: int = 0
) -> Rows:
    """Takes the columns out of a `datasets.Dataset`, classes by their names."""
    wanted = chosen(dataset.column_names, origin, config)
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
    numbers = range(first + 1, first + 1 + len(dataset))
    return rows_of(columns, Where(origin, numbers), origin, config)
