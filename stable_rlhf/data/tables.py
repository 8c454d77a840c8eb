"""Rows of a data file in any format: JSON lines, CSV, parquet, Arrow, and data sets by their name on a hub.

Rows come one after another, so that what does not fit in memory can be read. The libraries of the columnar formats are
imported when a file needs them.
"""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stable_rlhf.data.jsonl import bad, check_file, check_row, parse_row, read_lines
from stable_rlhf.data.records import DataError

Row = Callable[[], dict[str, Any]]
"""A row that is checked when it is asked for: what is wrong with it is a ``BadRow``."""

HUB = "hub:"  # before the name of a data set
_BATCH = 1024  # rows of a parquet or Arrow file that are in memory at the same time
_LARGEST_CELL = 2**27  # characters of CSV
# Cells of CSV are text; these columns have numbers.
_NUMBERS = {"margin", "score", "entropy", "satisfaction", "length", "preference"}
_OPTIONAL = {"task", "skill", "finished"}  # columns whose empty cells are none; a response may be an empty text


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a name is of a data set on a hub: ``hub:NAME``, ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIG:SPLIT``."""
    return os.fspath(path).startswith(HUB)


def rows_of(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, Row]]:
    """Number (from 1) and row of each row of a file, a folder or a data set on a hub, whose format its name tells;
    ``columns`` as in `renamed`, which is applied but to what a stage of ours wrote: that has our names already.

    Raises:
        DataError: it is missing, or cannot be read as what its name says.
        ModuleNotFoundError: its format needs a library that is not installed.
    """
    if not columns or (not is_hub_name(path) and (path.parent / "stage.json").is_file()):
        return _rows(path, {})
    return ((number, partial(_renamed, row, columns)) for number, row in _rows(path, columns))


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    return renamed(row(), columns)


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    if is_hub_name(path):
        return _hub(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no file can have
        return _folder(path)
    ending = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    if ending == ".parquet":
        return _parquet(path)
    if ending == ".arrow":
        return _arrow(path)
    if ending in (".csv", ".csv.gz"):
        return _csv(path, columns)
    return ((number, partial(parse_row, line)) for number, line in read_lines(path))


def files_of(path: Path) -> list[Path]:
    """The files that a name stands for: those of a folder, none of a data set on a hub."""
    if os.path.isdir(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with our names for its columns, which ``columns`` gives theirs of. ``a.b`` is the column ``b`` inside of
    ``a``, and inside of each entry where ``a`` is a list; a column that is not there is left out."""
    taken = {ours: _inside(row, theirs.split(".")) for ours, theirs in columns.items()}
    gone = {theirs.split(".")[0] for ours, theirs in columns.items() if taken[ours] is not None}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {ours: value for ours, value in taken.items() if value is not None}


def _inside(value: Any, names: list[str]) -> Any:
    for at, name in enumerate(names):
        if isinstance(value, list):
            found = [_inside(item, names[at:]) for item in value]
            return None if all(item is None for item in found) else found
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, in which a column without a value is null: it is left out."""
    return check_row({name: value for name, value in row.items() if value is not None})


# Files.


def _csv(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    check_file(path, "a .csv file")
    csv.field_size_limit(_LARGEST_CELL)
    number = 0
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns have one name: {header}")
            for cells in reader:
                if cells:
                    number += 1
                    yield number, partial(_csv_row, header, cells, columns)
    except (csv.Error, UnicodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8, after row {number}: {error}") from error


def _csv_row(header: list[str], cells: list[str], columns: Mapping[str, str]) -> dict[str, Any]:
    if len(cells) != len(header):
        bad(f"has {len(cells)} cells for {len(header)} columns")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in {columns.get(name, name) for name in _OPTIONAL} & row.keys():
        row[name] = row[name] or None
    for name in {columns.get(name, name) for name in _NUMBERS} & row.keys():
        try:
            row[name] = float(row[name]) if row[name].strip() else None
        except ValueError:
            bad(f"'{name}' must be a number, got {row[name][:40]!r}")
    finished = columns.get("finished", "finished")
    if isinstance(text := row.get(finished), str) and text.lower() in ("true", "false"):
        row[finished] = text.lower() == "true"
    return _checked(row)


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    check_file(path, "a .parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=_BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error


def _arrow(path: Path) -> Iterator[tuple[int, Row]]:
    check_file(path, "an .arrow file")
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                tables = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:  # a stream, which is what `datasets` writes
                source.seek(0)
                tables = iter(pyarrow.ipc.open_stream(source))
            yield from _batches(path, tables)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Arrow: {_first_line(error)}") from error


def _batches(path: Path, batches: Iterator[Any]) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns have one name: {names}")
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                number += 1
                yield number, partial(_checked, row)


# Folders and hubs.


def _folder(path: Path) -> Iterator[tuple[int, Row]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        if not splits:
            raise DataError(f"{path}: names splits, and none of their folders is there; was it saved whole?")
        raise DataError(f"{path}: holds the splits {', '.join(splits)}; name one of them: {path / splits[0]}")
    if (path / "state.json").is_file():
        return _saved(path)
    if files := sorted(path.glob("*.parquet")):
        return _numbered(row for file in files for _, row in _parquet(file))
    check_file(path, "a .jsonl or other data file, a folder of .parquet files, or one that `datasets` saved")
    raise AssertionError("a folder is no file")


def _saved(path: Path) -> Iterator[tuple[int, Row]]:
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(path))
    except Exception as error:  # of many libraries
        raise DataError(f"{path}: cannot be read as a data set: {_first_line(error)}") from error
    return _numbered(partial(_checked, row) for row in rows)


def _hub(path: Path) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset

    name, *rest = str(path).removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{path}: expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    config, split = [None, "train", *rest][-2:] if len(rest) != 1 else (None, rest[0])
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        yield from _numbered(partial(_checked, row) for row in rows)
    except Exception as error:
        raise DataError(f"{path}: cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error


def _numbered(rows: Iterator[Row]) -> Iterator[tuple[int, Row]]:
    return enumerate(rows, start=1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
