"""The record of a checkpoint: what is read back is what was written, or refused."""

import json
import math
from pathlib import Path

import pytest

from flax_lstm import manifest
from flax_lstm.leaves import Leaf

LEAVES = {
    "a": Leaf((2, 3), "float32", None, "0" * 64),
    "key": Leaf((2,), "uint32", "key<fry>", "1" * 64),
    "step": Leaf((), "int32", None, "2" * 64),
}
WHERE = Path("checkpoints/7")


def write(path: Path, record: dict) -> Path:
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("metric", "kept"), [(0.5, 0.5), (math.nan, None), (math.inf, None)]
)
def test_a_record_comes_back_as_it_was(tmp_path, metric, kept):
    made = manifest.make_record(7, LEAVES, {"best": 1 / 3, "none": None}, metric)
    got = manifest.read_record(write(tmp_path / "r", made), WHERE)
    assert got == {name: value for name, value in made.items() if name != "sha256"}
    assert (got["step"], got["metric"], got["meta"]["best"]) == (7, kept, 1 / 3)
    assert manifest.recorded_leaves(got) == LEAVES


@pytest.mark.parametrize(
    "text",
    [None, "", "[]", "3", '{"step": 7}', '{"sha256": 0}', "{", "[" * 200_000],
    ids=lambda text: "no file" if text is None else text[:20],
)
def test_what_is_no_record_is_damaged(tmp_path, text):
    if text is not None:
        (tmp_path / "r").write_text(text)
    words = "checkpoint checkpoints/7 is damaged: "
    with pytest.raises(manifest.DamagedCheckpointError, match=words):
        manifest.read_record(tmp_path / "r", WHERE)


def test_a_changed_record_is_damaged(tmp_path):
    made = manifest.make_record(7, LEAVES, {}, 0.5)
    with pytest.raises(manifest.DamagedCheckpointError, match="SHA-256 of its meta"):
        manifest.read_record(write(tmp_path / "r", {**made, "step": 8}), WHERE)


def test_only_floating_numbers_are_cast_and_only_when_asked():
    wide = {**LEAVES, "a": Leaf((2, 3), "float64")}
    manifest.compare(WHERE, LEAVES, wide, cast_dtype=True)
    words = r"a float32\[2, 3\], the configuration asks for float64\[2, 3\].*cast-dtype"
    with pytest.raises(manifest.CheckpointMismatchError, match=words):
        manifest.compare(WHERE, LEAVES, wide)
    for name, other in (
        ("step", Leaf((), "int8")),
        ("step", Leaf((), "float32")),
        ("key", Leaf((2,), "uint32", "key<rbg>")),
        ("a", Leaf((3, 2), "float64")),
        ("a", Leaf((2, 3), "int8")),
    ):
        with pytest.raises(
            manifest.CheckpointMismatchError, match=f"has {name} "
        ) as refused:
            manifest.compare(WHERE, LEAVES, {**LEAVES, name: other}, cast_dtype=True)
        assert "--cast-dtype" not in str(refused.value)  # it would not help
