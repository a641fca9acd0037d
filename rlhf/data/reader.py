"""Files to rows. A bad row is named by file, line and fault; it stops the reading or is counted, never lost in silence.

Lines end at LF only (a row may hold U+2028); CRLF, a byte order mark at the start and blank lines are fine.
"""

import codecs
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import zstandard

from rlhf.data.pieces import cut_before
from rlhf.errors import DataError

MAX_LINE_BYTES = 16 * 2**20  # a longer line is a bad row, so that no file can exhaust the memory
MAX_TEXT_BYTES = 1024 * 2**20  # a plain text file is one document; a JSON array is read whole, too
WHOLE_TEXT_BYTES = 8 * 2**20  # where long texts are split, a larger plain text file is several documents
PART_CHARACTERS = 2**20  # of about so many characters each

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


Counted = Callable[[int], None]  # is told how many bytes of a file were read just now


def _nobody(_: int) -> None:
    """Whom bytes are told that nobody counts."""


def read_rows(path: Path, faults: Faults, counted: Counted = _nobody, *, split_texts: bool = False) -> Iterator[Row]:
    """The rows of one file by its ending: .jsonl, .parquet, .txt (one document), .json (lines or an array); all but
    Parquet also as .gz or .zst.

    With `split_texts` a plain text file of more than 8 MiB is several documents, cut at blank lines, and is never held
    whole. Raises DataError where the file itself can't be read, or holds no row at all.
    """
    name = path.name.lower()
    kind = name.removesuffix(".gz").removesuffix(".zst")
    found = False
    bad_before = sum(faults.counts.values())
    try:
        if name.endswith(".parquet"):
            rows = _parquet_rows(path, counted)
        elif kind.endswith(".txt"):
            rows = _text_parts(path, counted) if split_texts else _text_row(path, counted)
        elif kind.endswith(".json") and _is_array(path):
            rows = _array_rows(path, faults, counted)
        elif kind.endswith((".jsonl", ".json")):
            rows = _json_rows(path, faults, counted)
        else:
            raise DataError(
                f"{path}: unknown kind of file; known are .jsonl, .json, .txt, each also as .gz and .zst, and .parquet"
            )
        for row in rows:
            found = True
            yield row
    except (gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: not a gzip file, or a damaged one") from None
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: not a zstd file, or a damaged one ({error})") from None
    except EOFError:
        raise DataError(f"{path}: the {'zstd' if name.endswith('.zst') else 'gzip'} file is cut short") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None
    if not found:
        seen = sum(faults.counts.values()) - bad_before
        raise DataError(f"{path}: no good row" + (f" ({seen} bad ones)" if seen else ": the file is empty"))


class _CountedFile(io.FileIO):
    """A file that tells how many bytes are read of it."""

    def __init__(self, path: Path, counted: Counted) -> None:
        super().__init__(path)
        self._counted = counted

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        self._counted(size)
        return size


class _ZstdFile(io.RawIOBase):
    """What a zstd file holds, one frame after the other. Raises EOFError where the last one is cut short."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._frame = file, zstandard.ZstdDecompressor().decompressobj()
        self._begun = False  # whether the frame has had any of its bytes
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as one step of decompression goes. 4 bytes may stand for 128 KiB: steps are short."""
        while not self._waiting:
            data = self._frame.unused_data or self._file.read(2**8)
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            if not data and self._begun:
                raise EOFError
            if not data:
                return 0
            self._begun = True
            self._waiting = memoryview(self._frame.decompress(data))
        size = min(len(self._waiting), len(buffer))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size


@contextmanager
def _opened(path: Path, counted: Counted = _nobody) -> Iterator[IO[bytes]]:
    """A file to read, decompressed by its ending."""
    with io.BufferedReader(_CountedFile(path, counted), 2**17) as file:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield cast(IO[bytes], unpacked)
        elif path.name.lower().endswith(".zst"):
            with io.BufferedReader(_ZstdFile(file), 2**17) as decompressed:
                yield decompressed
        else:
            yield file


def _is_array(path: Path) -> bool:
    """Whether the first sign of a file is that of a JSON array."""
    with _opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start and (more := file.read(2**20)):
            start = more.lstrip()
    return start.startswith(b"[")


def _array_rows(path: Path, faults: Faults, counted: Counted) -> Iterator[Row]:
    data = bytearray()
    with _opened(path, counted) as file:
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


def _json_rows(path: Path, faults: Faults, counted: Counted) -> Iterator[Row]:
    with _opened(path, counted) as file:
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


def _text_row(path: Path, counted: Counted) -> Iterator[Row]:
    with _opened(path, counted) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{path}: larger than {MAX_TEXT_BYTES // 2**20} MiB; make it JSON Lines, one document a line")
    text = _decoded(path, data)
    if text.strip():
        yield Row(path, 1, {"text": text})


def _text_parts(path: Path, counted: Counted) -> Iterator[Row]:
    """A plain text file as one document, or, if it is large, as several, each with the line that it begins in."""
    with _opened(path, counted) as file:
        start = file.read(WHOLE_TEXT_BYTES + 1)
        decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
        waiting, data = "", start
        while data:
            last = len(start) <= WHOLE_TEXT_BYTES
            try:
                waiting += decoder.decode(data, final=last)
                data = b"" if last else file.read(2**20)
                waiting += "" if data else decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                bad = line + waiting.count("\n") + data.count(b"\n", 0, error.start)
                raise DataError(f"{path}, line {bad}: not UTF-8 text") from None
            while not last and len(waiting) > (2 * PART_CHARACTERS if data else PART_CHARACTERS):
                end = cut_before(waiting, 0, PART_CHARACTERS)
                part, waiting = waiting[:end], waiting[end:]
                if part.strip():
                    yield Row(path, line, {"text": part})
                line += part.count("\n")
        if waiting.strip():
            yield Row(path, line, {"text": waiting})


def _decoded(path: Path, data: bytes) -> str:
    """The text of a whole file, without its byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text") from None


def _parquet_rows(path: Path, counted: Counted) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number, size = 0, path.stat().st_size
        for batch in file.iter_batches(batch_size=1024):
            counted(size * batch.num_rows // max(file.metadata.num_rows, 1))
            for value in batch.to_pylist():
                number += 1
                yield Row(path, number, value, "row")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one: {error}") from None
