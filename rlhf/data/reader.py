"""Files to rows. A bad row is named by file, line and fault; it stops the reading or is counted, never lost in silence.

Lines end at LF only (a row may hold U+2028); CRLF, a byte order mark at the start and blank lines are fine.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from rlhf.errors import DataError

MAX_LINE_BYTES = 16 * 2**20  # a longer line is a bad row, so that no file can exhaust the memory
MAX_TEXT_BYTES = 1024 * 2**20  # a plain text file is one document; a JSON array is read whole, too

Unit = Literal["line", "row"]  # what a row's number counts


class Row(NamedTuple):
    """One row of a file and where it stands; `line` counts lines from 1, or rows where these are no lines."""

    path: Path
    line: int
    value: dict[str, Any]
    unit: Unit = "line"


@dataclass
class Faults:
    """What is done about bad rows: `error` stops at the first one, `skip` counts them."""

    on_bad_row: Literal["error", "skip"] = "error"
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def bad(self, path: Path, line: int, fault: str, unit: Unit = "line") -> None:
        """Records a bad row, or raises DataError."""
        message = f"{path}, {unit} {line}: {fault}"
        if self.on_bad_row == "error":
            raise DataError(f"{message}\n(data.on_bad_row=skip counts bad rows and goes on)")
        self.counts[str(path)] += 1
        if len(self.examples) < 5:
            self.examples.append(message)

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.counts.clear()
        self.examples.clear()

    def report(self) -> str:
        """What was skipped, in a line or two; empty where nothing was."""
        if not self.counts:
            return ""
        files = ", ".join(f"{path}: {n}" for path, n in self.counts.items())
        return f"skipped {sum(self.counts.values())} bad rows ({files}); the first: {self.examples[0]}"


def read_rows(path: Path, faults: Faults) -> Iterator[Row]:
    """The rows of one file by its ending: .jsonl, .jsonl.gz, .parquet, .txt (one document), .json (lines or an array).

    Raises DataError where the file itself can't be read, or holds no row at all.
    """
    name = path.name.lower()
    found = False
    bad_before = sum(faults.counts.values())
    try:
        if name.endswith(".parquet"):
            rows = _parquet_rows(path)
        elif name.endswith(".txt"):
            rows = _text_row(path)
        elif name.endswith((".json", ".json.gz")) and _is_array(path):
            rows = _array_rows(path, faults)
        elif name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".json")):
            rows = _json_rows(path, faults)
        else:
            raise DataError(f"{path}: unknown kind of file; known are .jsonl, .jsonl.gz, .json, .parquet and .txt")
        for row in rows:
            found = True
            yield row
    except (gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: not a gzip file, or a damaged one") from None
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut short") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None
    if not found:
        seen = sum(faults.counts.values()) - bad_before
        raise DataError(f"{path}: no good row" + (f" ({seen} bad ones)" if seen else ": the file is empty"))


def _opened(path: Path) -> IO[bytes]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rb")


def _is_array(path: Path) -> bool:
    """Whether the first sign of a file is that of a JSON array."""
    with _opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start and (more := file.read(2**20)):
            start = more.lstrip()
    return start.startswith(b"[")


def _array_rows(path: Path, faults: Faults) -> Iterator[Row]:
    data = bytearray()
    with _opened(path) as file:
        while part := file.read(2**20):
            data += part
            if len(data) > MAX_TEXT_BYTES:
                limit = MAX_TEXT_BYTES // 2**20
                raise DataError(f"{path}: a JSON array larger than {limit} MiB; make it JSON Lines, one object a line")
    try:
        values = json.loads(_decoded(path, bytes(data)))
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    for number, value in enumerate(values, 1):
        if isinstance(value, dict):
            yield Row(path, number, value, "row")
        else:
            faults.bad(path, number, _no_object(value), "row")


def _json_rows(path: Path, faults: Faults) -> Iterator[Row]:
    with _opened(path) as file:
        for number, raw in enumerate(_lines(file), 1):
            if raw is None:
                faults.bad(path, number, f"longer than {MAX_LINE_BYTES // 2**20} MiB")
                continue
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip() == b"[":
                    raise DataError(f"{path}: one JSON array instead of JSON Lines (one object a line)")
            if not raw.strip():
                continue
            value, fault = _parse(raw)
            if fault:
                faults.bad(path, number, fault)
            else:
                yield Row(path, number, value)


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too long, which is read past but never held."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.rstrip(b"\r\n")


def _parse(raw: bytes) -> tuple[dict[str, Any], str]:
    """The object of a line, or what is wrong with it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start} of the line"
    try:
        value = json.loads(text)
    except RecursionError:
        return {}, "JSON nested too deeply"
    except ValueError as error:
        return {}, f"not valid JSON: {error}"
    if not isinstance(value, dict):
        return {}, _no_object(value)
    return value, ""


def _no_object(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return f"a JSON object is expected, this is {'null' if value is None else names[type(value)]}"


def _text_row(path: Path) -> Iterator[Row]:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{path}: larger than {MAX_TEXT_BYTES // 2**20} MiB; make it JSON Lines, one document a line")
    text = _decoded(path, path.read_bytes())
    if text.strip():
        yield Row(path, 1, {"text": text})


def _decoded(path: Path, data: bytes) -> str:
    """The text of a whole file, without its byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(path, number, value, "row")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one: {error}") from None
