"""A folder of one text per file: its parts, and what of it cannot be read."""

import errno
import os

import pytest

from flax_lstm.config import DataConfig, UserError
from flax_lstm.sources import read

CONFIG = DataConfig()


def make_folder(root, parts):
    for part, labels in parts.items():
        for label, texts in labels.items():
            folder = root / part / label
            folder.mkdir(parents=True)
            for i, text in enumerate(texts):
                (folder / f"{i}_7.txt").write_text(text)
    return str(root)


def test_a_folder_in_aclimdb_form(tmp_path):
    parts = {
        "train": {"pos": ["a", "b"], "neg": ["c"], "unsup": ["u"]},
        "test": {"pos": ["d"], "neg": ["e"]},
    }
    source = read(make_folder(tmp_path / "x", parts), CONFIG)
    for part, labels in parts.items():
        rows = source.parts[part]
        want = {(t, n) for n in ("pos", "neg") for t in labels[n]}
        assert set(zip(rows.texts, rows.labels, strict=True)) == want
    only = read(str(tmp_path / "x" / "test"), CONFIG)
    assert list(only.parts["train"].texts) == ["e", "d"]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folder_has_its_validation_part_by_any_usual_name(name, tmp_path):
    parts = {
        "train": {"pos": ["a"], "neg": ["b"]},
        name: {"pos": ["c"], "neg": ["d"]},
        "test": {"pos": ["e"], "neg": ["f"]},
    }
    root = make_folder(tmp_path, parts)
    source = read(root, CONFIG)
    assert list(source.parts) == ["train", "validation", "test"]
    assert list(source.parts["validation"].texts) == ["d", "c"]
    assert list(source.parts["validation"].labels) == ["neg", "pos"]
    file = tmp_path / name / "pos" / "0_7.txt"
    file.write_text("g")
    assert read(root, CONFIG).sha256 != source.sha256
    (tmp_path / "validating").mkdir()  # no name of a part
    assert list(read(root, CONFIG).parts) == ["train", "validation", "test"]
    other = "val" if name == "dev" else "dev"
    (tmp_path / other).mkdir()
    with pytest.raises(UserError, match=r"has two folders for the validation part: "):
        read(root, CONFIG)


def test_files_of_a_folder_that_are_no_texts_are_told(tmp_path):
    root = make_folder(tmp_path, {"train": {"pos": ["a", "b"], "neg": ["c"]}})
    (tmp_path / "train" / "pos" / "0_7.txt").rename(tmp_path / "train/pos/1_1.TXT")
    assert read(root, CONFIG).notes == ()
    assert sorted(read(root, CONFIG).parts["train"].texts) == ["a", "b", "c"]
    (tmp_path / "train" / "pos" / "d.text").write_text("d")
    (tmp_path / "train" / "pos" / "more").mkdir()
    source = read(root, CONFIG)
    assert sorted(source.parts["train"].texts) == ["a", "b", "c"]
    folder = tmp_path / "train" / "pos"
    assert source.notes == (
        f"{folder}: 2 without the suffix .txt, not used (the first is d.text)",
    )


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    """By the system's own words, which a process of root would not hear."""
    root = make_folder(tmp_path, {"train": {"pos": ["a"], "neg": ["b"]}})
    closed, scandir, listdir = str(tmp_path / "train" / "pos"), os.scandir, os.listdir

    def closed_to(function):
        def asked(path):
            if str(path) == closed:
                raise PermissionError(errno.EACCES, "Permission denied", closed)
            return function(path)

        return asked

    monkeypatch.setattr(os, "scandir", closed_to(scandir))
    monkeypatch.setattr(os, "listdir", closed_to(listdir))
    with pytest.raises(UserError, match=r"cannot read .*denied: '.*train/pos'"):
        read(root, CONFIG)


def test_a_folder_of_another_form_says_what_is_expected(tmp_path):
    root = make_folder(tmp_path / "x", {"train": {"pos": ["a"]}})
    with pytest.raises(UserError, match=r"no folder .*train/neg; expected .*train/pos"):
        read(root, CONFIG)
    (tmp_path / "y").mkdir()
    with pytest.raises(UserError, match=r"no folder .*train/neg"):
        read(str(tmp_path / "y"), CONFIG)
