"""A folder in the form of aclImdb: one text per file, in a folder for each label."""

import hashlib
from pathlib import Path
from typing import Any

from flax_lstm.columns import Rows
from flax_lstm.config import DataConfig, UserError
from flax_lstm.formats import decode
from flax_lstm.sharing import Share
from flax_lstm.stretches import read_errors

PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def read_text_folder(
    path: Path, config: DataConfig, share: Share
) -> tuple[dict[str, Rows], str, str, tuple[str, ...]]:
    """Reads `train/pos`, `train/neg`, and `validation/` and `test/` the same.

    Args:
      path: The folder.
      config: Names of columns, of which it has none.
      share: The processes that read together, and what of it is this one's.

    Returns:
      Rows of each part, the folder's name, the SHA-256 of its files, and notes.

    Raises:
      UserError: If it has not that form, or a file cannot be read.
    """
    with share.together(), read_errors(path):
        if config.group_column:
            raise UserError(
                f"the folder {path} has no columns; leave out --group-column."
            )
        listed, notes = _files_of_folder(path)
    share.agree(files={part: len(files) for part, files in listed.items()})
    parts, mine = {}, hashlib.sha256()
    with share.together():
        for part, files in listed.items():
            own = files[share.stretch(len(files))]
            texts = [decode(_digested(file, path, mine), file) for file, _ in own]
            labels = [label for _, label in own]
            parts[part] = Rows(texts, labels, None, [str(file) for file, _ in own])
    digest = mine.hexdigest()
    if not share.whole:
        digest = _digest_of_folder(path, listed, share, digest)
    return parts, str(path), digest, tuple(notes)


def _files_of_folder(
    path: Path,
) -> tuple[dict[str, list[tuple[Path, str]]], list[str]]:
    """Returns the files of each part with their labels, and what else there is."""
    parts, notes = {}, []
    for part in PART_NAMES:
        folder = _folder_of_part(path, part)
        if folder is None:
            continue
        parts[part] = []
        for label in ("neg", "pos"):
            if not (folder / label).is_dir():
                raise UserError(
                    f"no folder {folder / label}; expected {path}/train/pos and "
                    f"{path}/train/neg (and validation/ and test/ the same) with one "
                    "text per .txt file."
                )
            others = []
            # Not glob, which takes a folder that it may not read for an empty one.
            for file in sorted((folder / label).iterdir()):
                if file.suffix.lower() == ".txt":
                    parts[part].append((file, label))
                else:
                    others.append(file.name)
            if others:
                notes.append(
                    f"{folder / label}: {len(others)} without the suffix .txt, not "
                    f"used (the first is {others[0]})"
                )
    return parts, notes


def _folder_of_part(path: Path, part: str) -> Path | None:
    """Returns where a part lies; the training part may be the folder itself."""
    found = [path / name for name in PART_NAMES[part] if (path / name).is_dir()]
    if len(found) > 1:
        raise UserError(
            f"{path} has two folders for the {part} part: {found[0].name} and "
            f"{found[1].name}. Move one of them away."
        )
    if found or part != "train":
        return found[0] if found else None
    return path if (path / "pos").is_dir() else path / "train"


def _digested(file: Path, folder: Path, *digests: Any) -> bytes:
    """Reads a file of a folder; its name and content go into the digests."""
    with read_errors(file):
        content = file.read_bytes()
    for digest in digests:
        digest.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    return content


def _digest_of_folder(
    path: Path, listed: dict[str, list[tuple[Path, str]]], share: Share, mine: str
) -> str:
    """Returns the SHA-256 of all files; see `stretches.common_digest`."""
    said, whole = share.gather(mine), hashlib.sha256()
    with share.together():
        if share.process == 0:
            of_all = [hashlib.sha256() for _ in said]
            for files in listed.values():
                for process, digest in enumerate(of_all):
                    for file, _ in files[
                        Share(process, share.count).stretch(len(files))
                    ]:
                        _digested(file, path, whole, digest)
            for process, digest in enumerate(of_all):
                if digest.hexdigest() != said[process]:
                    raise UserError(
                        f"process {process} differs from process 0 in the files of "
                        f"{path}. Give all processes the same data."
                    )
    return share.gather(whole.hexdigest())[0]
