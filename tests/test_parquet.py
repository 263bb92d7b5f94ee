"""Parquet files: whole or refused, and nothing unpacked that no memory holds."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_lstm import parquet
from flax_lstm.config import UserError
from flax_lstm.sharing import Share

TABLE = pa.table({"text": ["good", "bad"], "label": [1, 0]})


def test_a_file_is_read_whole_and_leaves_no_cache(tmp_path, monkeypatch):
    pq.write_table(TABLE, tmp_path / "file.parquet")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    got = parquet.read_parquet(tmp_path / "file.parquet")
    assert got.to_dict() == TABLE.to_pydict()
    assert [path.name for path in tmp_path.rglob("*")] == ["file.parquet"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "file.parquet does not read as"),
        (lambda content: b"hello", "file.parquet does not read as"),
        (lambda content: b"", "file.parquet does not read as"),
    ],
    ids=["cut", "other", "empty"],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = tmp_path / "file.parquet"
    pq.write_table(TABLE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        parquet.read_parquet(path)


def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path):
    """And read where there is none: `good` is `goof` by two bits."""
    path = tmp_path / "file.parquet"
    for checksums in (False, True):
        pq.write_table(
            TABLE,
            path,
            write_page_checksum=checksums,
            compression="none",
            write_statistics=False,
        )
        path.write_bytes(path.read_bytes().replace(b"good", b"goof"))
        if not checksums:
            assert parquet.read_parquet(path)["text"][0] == "goof"
    words = r"file\.parquet does not read as Parquet: .*[Cc]hecksum"
    with pytest.raises(UserError, match=words):
        parquet.read_parquet(path)


@pytest.mark.parametrize(
    "read",
    [parquet.read_parquet, lambda path: parquet.read_parquet_part(path, Share(1, 2))],
    ids=["whole", "part"],
)
def test_a_name_that_two_columns_have_is_told(tmp_path, read):
    path = tmp_path / "file.parquet"
    twice = pa.table([TABLE["text"], TABLE["text"], TABLE["label"]], list("ttl"))
    pq.write_table(twice, path)
    with pytest.raises(UserError, match=r"file\.parquet has more than one column 't'"):
        read(path)


def test_no_rows_are_told(tmp_path):
    pq.write_table(TABLE.slice(0, 0), tmp_path / "file.parquet")
    with pytest.raises(UserError, match=r"no rows in .*file\.parquet\.$"):
        parquet.read_parquet(tmp_path / "file.parquet")


def test_rows_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    """Ten thousand equal rows are packed into less than a kilobyte and a half."""
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"text": ["x"] * 10_000, "label": [1] * 10_000}), path)
    assert path.stat().st_size < 1500
    monkeypatch.setattr(parquet, "machine_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"file.parquet holds .* GiB of memory"):
        parquet.read_parquet(path)
    monkeypatch.setattr(parquet, "machine_bytes", lambda: 2_000_000)
    assert len(parquet.read_parquet(path)) == 10_000
    monkeypatch.setattr(parquet, "machine_bytes", lambda: None)
    assert len(parquet.read_parquet(path)) == 10_000
