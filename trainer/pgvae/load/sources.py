"""Opens files: CSV or Parquet, plain or compressed, from disk or standard input; gives rows with their line numbers."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from pgvae.errors import PgvaeError

BATCH_ROWS = 8192
# A quote that is never closed would swallow the rest of the file; a field of this size is taken for one.
_LONGEST_FIELD = 4 * 1024 * 1024
# Whole floats below this are exact.
_EXACT = 2**53
_PARQUET_MAGIC = b"PAR1"
_DECOMPRESSORS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", lambda raw: zstandard.ZstdDecompressor().stream_reader(raw)),
    (b"BZh", bz2.BZ2File),
)


@dataclass(kw_only=True)
class Batch:
    """Rows as lists of texts, the line (or row) at which each starts, and rows that could not be split."""

    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    broken: list[tuple[int, str, str]] = field(default_factory=list)
    delimiter: str = ","


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open file: its header, and its rows by batches. `read_bytes` and `size` are of the file as it lies there."""

    name: str
    header: list[str]
    batches: Iterator[Batch]
    size: int | None
    read_bytes: Callable[[], int]


class _Counted(io.RawIOBase):
    """A raw file that counts what was read of it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


@contextmanager
def open_source(name: str, *, delimiter: str | None = None, encoding: str = "utf-8") -> Iterator[Source]:
    """Opens a file by its content, whatever its name ends in; `-` is standard input. PgvaeError where it cannot."""
    path = Path(name)
    if name != "-" and (path.is_dir() or not path.exists()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PgvaeError(f"file {name} {what}", hint="check the path; - is standard input")
    try:
        with sys.stdin.buffer if name == "-" else path.open("rb") as raw:
            counted = _Counted(raw)
            plain = _decompressed(io.BufferedReader(counted, 1 << 20))
            # A pipe, as of <(zcat …), has none.
            size = path.stat().st_size if path.is_file() else None
            if plain.peek(4)[:4] == _PARQUET_MAGIC:
                header, batches = _parquet(name, plain)
            else:
                header, batches = _csv(name, plain, delimiter, encoding)
            yield Source(name=name, header=header, batches=batches, size=size, read_bytes=lambda: counted.count)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise PgvaeError(f"file {name} is damaged: {error}", hint="fetch it again") from error
    except UnicodeError as error:
        raise PgvaeError(f"file {name}: {error}", hint="name its encoding, as in --encoding latin-1") from error


def _decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    head = raw.peek(8)
    for magic, opener in _DECOMPRESSORS:
        if head.startswith(magic):
            return io.BufferedReader(opener(raw), 1 << 20)
    return raw


def _csv(
    name: str, plain: io.BufferedReader, delimiter: str | None, encoding: str
) -> tuple[list[str], Iterator[Batch]]:
    # Bytes that are not of the encoding become surrogates, so that only their row is rejected.
    wanted = "utf-8-sig" if encoding.lower().replace("-", "") == "utf8" else encoding
    try:
        text = io.TextIOWrapper(plain, encoding=wanted, errors="surrogateescape", newline="")
    except LookupError as error:
        raise PgvaeError(f"encoding {encoding} is unknown", hint="give one such as utf-8 or latin-1") from error
    first = text.readline()
    if not first.strip():
        raise PgvaeError(f"file {name} is empty", hint="its first line must name the columns")
    delimiter = delimiter or max(",;\t|", key=first.count)
    csv.field_size_limit(_LONGEST_FIELD)
    # A header may hold newlines within quotes: the reader gets the line back.
    reader = csv.reader(_chain(first, text), delimiter=delimiter)
    header = next(reader)
    if any("\udc80" <= letter <= "\udcff" or letter == "\0" for field in header for letter in field):
        raise PgvaeError(
            f"the header of {name} is not {encoding}",
            hint="name its encoding, as in --encoding latin-1, or utf-16 where a spreadsheet wrote it",
        )
    return header, _csv_batches(name, reader, len(header), delimiter)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _csv_batches(name: str, reader: Any, width: int, delimiter: str) -> Iterator[Batch]:
    batch = Batch(delimiter=delimiter)
    line = reader.line_num + 1
    try:
        for row in reader:
            if len(row) == width:
                batch.rows.append(row)
                batch.lines.append(line)
            elif row:
                reason = f"{len(row)} fields where the header has {width}"
                batch.broken.append((line, reason, raw_line(row, delimiter)))
            line = reader.line_num + 1
            if len(batch.rows) + len(batch.broken) >= BATCH_ROWS:
                yield batch
                batch = Batch(delimiter=delimiter)
    except csv.Error as error:
        raise PgvaeError(
            f"file {name}, from line {line} on: {error}", hint="a quote that is opened there may never be closed"
        ) from error
    yield batch


def raw_line(row: list[str], delimiter: str) -> str:
    """Gives a row as one line of CSV, without what PostgreSQL cannot store."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="", delimiter=delimiter).writerow(row)
    return buffer.getvalue().replace("\0", "�").encode("utf-8", "replace").decode()


def _parquet(name: str, plain: io.BufferedReader) -> tuple[list[str], Iterator[Batch]]:
    import pyarrow
    from pyarrow import parquet

    # Parquet is read from its end, so a pipe or a compressed file has to be laid down first.
    spooled = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the reader that holds it
    shutil.copyfileobj(plain, spooled)
    try:
        file = parquet.ParquetFile(spooled)
    except pyarrow.ArrowException as error:
        raise PgvaeError(f"file {name} is damaged: {error}", hint="fetch it again") from error
    return list(file.schema_arrow.names), _parquet_batches(name, file)


def _parquet_batches(name: str, file: Any) -> Iterator[Batch]:
    import pyarrow

    line = 1
    try:
        for arrow in file.iter_batches(batch_size=BATCH_ROWS):
            columns = [[_text(value) for value in _plain(column).to_pylist()] for column in arrow.columns]
            rows = [list(row) for row in zip(*columns, strict=True)]
            yield Batch(rows=rows, lines=list(range(line, line + len(rows))))
            line += len(rows)
    except pyarrow.ArrowException as error:
        raise PgvaeError(f"file {name} is damaged: {error}", hint="fetch it again") from error


def _plain(column: Any) -> Any:
    """Gives a column without what Python's times lack, such as nanoseconds and the year 10 000: those as texts."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type) or pyarrow.types.is_date(column.type):
        return column.cast(pyarrow.string())
    return column.cast(pyarrow.time64("us"), safe=False) if pyarrow.types.is_time64(column.type) else column


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float):
        # Whole numbers of which some are missing are floats in many a file, as pandas writes them, and NaN is none.
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else str(value)
    return str(value)
