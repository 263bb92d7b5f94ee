"""Parquet files, read through `datasets` into memory, after what they claim is checked.

No cache outlives the reading, and nothing is unpacked that the memory cannot hold: some
kilobytes of Parquet can claim any number of rows. Checksums of pages are verified where
their writer left some, which Parquet does not ask of it: without them a changed letter
is a letter, and the first to tell is the SHA-256 that a run keeps of its file.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax_lstm.columns import check_names
from flax_lstm.config import UserError
from flax_lstm.host_memory import machine_bytes
from flax_lstm.sharing import Share

ROW_BYTES = 150
"""What a row takes at the least as Python objects: a string, a label, two places."""


def read_parquet(path: Path) -> Any:
    """Returns the `datasets.Dataset` of a Parquet file.

    Raises:
      UserError: If it is damaged, has no rows, or unpacks to more than the memory.
    """
    import datasets
    import pyarrow.dataset

    form = _form(path)
    groups = [form.row_group(n) for n in range(form.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    check_memory(path, unpacked + ROW_BYTES * form.num_rows)
    verified = pyarrow.dataset.ParquetFragmentScanOptions(
        page_checksum_verification=True
    )
    try:
        with tempfile.TemporaryDirectory() as cache, quiet_datasets():
            return datasets.Dataset.from_parquet(
                str(path),
                cache_dir=cache,
                keep_in_memory=True,
                fragment_scan_options=verified,
            )
    except Exception as error:  # its errors share no base class with pyarrow's
        raise _damaged(path, error.__cause__ or error) from error


class Part(NamedTuple):
    """Some consecutive rows of a Parquet file.

    Attributes:
      dataset: The rows, as a `datasets.Dataset`.
      first: Place of the first of them in the file, from 0.
      start: The first byte of the row groups that hold them.
      stop: Where these groups end.
    """

    dataset: Any
    first: int
    start: int
    stop: int


def read_parquet_part(path: Path, share: Share) -> Part:
    """Returns the rows of a Parquet file that are this process'.

    Rows are unpacked by whole groups, and those that are another's are dropped.

    Raises:
      UserError: As `read_parquet`.
    """
    import datasets.table
    import pyarrow.parquet

    form = _form(path)
    mine, end, needed = share.stretch(form.num_rows), 0, []
    first = stop = 0
    start = path.stat().st_size
    for number in range(form.num_row_groups):
        group = form.row_group(number)
        begin, end = end, end + group.num_rows
        if end <= mine.start or begin >= mine.stop:
            continue
        first = first if needed else begin
        needed.append(number)
        for column in map(group.column, range(group.num_columns)):
            place = column.dictionary_page_offset or column.data_page_offset
            start = min(start, place)
            stop = max(stop, place + column.total_compressed_size)
    unpacked = sum(form.row_group(n).total_byte_size for n in needed)
    check_memory(path, unpacked + ROW_BYTES * (mine.stop - mine.start))
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read_row_groups(needed)
            table = table.slice(mine.start - first, mine.stop - mine.start)
            dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    except Exception as error:  # its errors share no base class with pyarrow's
        raise _damaged(path, error) from error
    return Part(dataset, mine.start, min(start, stop), stop)


def _form(path: Path) -> Any:
    """Returns what a Parquet file says that it holds."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            form, names = file.metadata, file.schema_arrow.names
    except Exception as error:  # pyarrow's errors share no base class
        raise _damaged(path, error) from error
    check_names(names, path)
    if not form.num_rows:
        raise UserError(f"no rows in {path}.")
    return form


def check_memory(path: Path, size: int) -> None:
    """Raises UserError where what a file holds, `size` bytes, exceeds the memory."""
    there_is = machine_bytes()
    if there_is is not None and size > there_is:
        raise UserError(
            f"{path} holds {size / 2**30:,.0f} GiB at the least; this machine has "
            f"{there_is / 2**30:,.0f} GiB of memory. Give a part of it."
        )


@contextlib.contextmanager
def quiet_datasets(progress: bool = False) -> Iterator[None]:
    """Keeps the logs (and progress bars) of `datasets` out of the terminal."""
    import datasets

    hub = logging.getLogger("huggingface_hub")  # warns at each of six attempts
    level, hub_level = datasets.logging.get_verbosity(), hub.level
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    if not progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if not bars:
            datasets.enable_progress_bars()


def _damaged(path: Path, error: BaseException) -> UserError:
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{path} does not read as Parquet: {cause[0].rstrip('.')}. Is it complete, and "
        "is it Parquet?"
    )
