"""JSON and JSON lines, plain or gzip: the one place in which the package reads and writes them.

What is read can be written again: a row with NaN, an infinity or half a surrogate pair anywhere is refused where it is
read, with its line, and not hours later where a column that nobody used is written. Lines end at ``\\n`` alone, since
text may hold U+2028 and its like.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from stable_rlhf.data.records import DataError

MAX_DEPTH = 100  # of a row: what reads it, copies it or writes it may recurse, each with a limit of its own
_UTF8_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_LONG_NUMBER = re.compile(rb"[0-9]{309}")  # a whole number as long as the largest float
_JSON_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


class BadRow(Exception):
    """The reason why a row is refused, before file and line are known."""


def bad(reason: str) -> NoReturn:
    raise BadRow(reason)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _JSON_NAMES.get(type(value), "a number")


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number, and one that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def short(value: Any) -> str:
    """``repr`` for a message of one line."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_file(path: Path, expected: str = "a .jsonl or .jsonl.gz file") -> None:
    """Refuse what is no regular file: a pipe would be waited for, a device read without end.

    Raises:
        DataError: names the path and what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise DataError(f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise DataError(f"{path}: is {kind}, expected {expected}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank. Bytes, since str lines also break at U+2028.

    Raises:
        DataError: the file is missing, no regular file, or not whole.
    """
    check_file(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if line.startswith(_GZIP_MAGIC):
                        raise DataError(f"{path}: holds gzip data, so its name must end in .gz")
                    line = line.removeprefix(_UTF8_BOM)
                line = line.strip()
                if line:
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        BadRow: it is none, or holds what cannot be written again.
    """
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        bad(f"not UTF-8 text: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        bad(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        bad(f"nested more than {MAX_DEPTH} deep")
    except ValueError as error:  # a number of thousands of digits
        bad(f"not JSON that can be read: {str(error).partition('; use sys.')[0]}")
    if not isinstance(value, dict):
        whole = "; the file must hold one object a line, not one array" if isinstance(value, list) else ""
        bad(f"expected a JSON object, found {kind_of(value)}{whole}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    check_row(value)
    if _LONG_NUMBER.search(line):
        _name_unwritable(value)
    return value


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, as it is.

    Raises:
        BadRow: it holds what cannot be written again as JSON in UTF-8.
    """
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # far quicker than a look at every value
    except ValueError:
        _name_unwritable(row)
    except TypeError as error:
        bad(f"holds what JSON has no word for: {error}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                bad(f"the key {short(key)} is given twice")
            seen.add(key)
    return row


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level for _, item in _inside(part) if isinstance(item, (dict, list))]
        if not level:
            return
    bad(f"nested more than {MAX_DEPTH} deep")


def _name_unwritable(row: dict[str, Any]) -> None:
    """Refuse the row for the first value of it that cannot be written again, if there is one."""
    todo: list[tuple[str, Any]] = [("", row)]
    while todo:
        where, value = todo.pop()
        if isinstance(value, float) and math.isnan(value):
            bad(f"'{where}' holds NaN, which is no number")
        if type(value) in (int, float) and abs(value) > sys.float_info.max:
            bad(f"'{where}' holds a number that is infinite or too large")
        if isinstance(value, str) and not _is_text(value):
            bad(f"'{where}' holds half of a surrogate pair, which is not text")
        for key, item in _inside(value):
            if isinstance(key, str) and not _is_text(key):
                bad(f"the key {short(key)} holds half of a surrogate pair, which is not text")
            name = f"[{key}]" if isinstance(key, int) else f".{key[:40]}" if where else key[:40]
            todo.append((f"{where}{name}", item))


def _is_text(value: str) -> bool:
    """False for a lone \\ud800: it passes JSON and fails in the tokenizer, hours later."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: str | os.PathLike[str], *keys: str) -> dict[str, Any]:
    """The object that a JSON file of the package's own holds.

    Raises:
        DataError: it is missing or cannot be read, is no JSON object, or lacks one of ``keys``; the file is named.
    """
    check_file(Path(path), "a JSON file")
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {kind_of(content)}")
    for key in keys:
        if key not in content:
            raise DataError(f"{path}: has no {key!r}")
    return content


def read_jsonl(path: str | os.PathLike[str], *, torn_end: bool = False) -> list[dict[str, Any]]:
    """The rows of a file that the package wrote itself.

    torn_end: What is after the first line that cannot be read is left out, in place of an error: the line that was
        being written when the process was killed.

    Raises:
        DataError: a file or a line cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for number, line in read_lines(Path(path)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if torn_end:
                break
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {kind_of(row)}")
        rows.append(row)
    return rows


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line, gzip-compressed if the name ends in ``.gz``; returns the number of rows.

    The rows go to a temporary name beside ``path``, which is renamed at the end: a reader sees the old file or the
    whole new one, and a failure leaves the old one. Missing parent folders are made. Equal rows give equal bytes.

    Raises:
        DataError: a row holds a value that JSON cannot (NaN and infinities included) or text that UTF-8 cannot.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as raw:
            with _compressed(raw, path) as out:
                for row in rows:
                    try:
                        line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode()
                    except (TypeError, ValueError, RecursionError) as error:
                        raise DataError(f"{path}: cannot write row {count + 1}: {error}") from error
                    out.write(line + b"\n")
                    count += 1
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


@contextmanager
def _compressed(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    if path.suffix != ".gz":
        yield raw
        return
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as out:  # no name, no time: equal bytes
        yield cast(IO[bytes], out)


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON that every reader takes: ``null`` where a result is not a finite number, never ``NaN`` or ``Infinity``."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
