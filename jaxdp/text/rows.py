"""The rows of a file, each with the number of its first line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def read_utf8(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; check the path.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file.")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        # Its offsets count from behind a byte order mark.
        start = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{path.name}, line {line}: byte 0x{data[start]:02x} at offset {start} is not UTF-8; convert the file, for instance "
            "with iconv -f LATIN1 -t UTF-8."
        ) from None


def texts(text: str, record: str) -> Iterator[tuple[int, str]]:
    """The texts of a plain file, each with the number of its first line."""
    text = text.replace("\r\n", "\n")
    if record == "file":
        if text.strip():
            yield 1, text
        return
    first, paragraph = 1, []
    for line, row in enumerate([*text.split("\n"), ""], start=1):
        row = row.strip()
        if record == "line":
            if row:
                yield line, row
        elif row:
            first = first if paragraph else line
            paragraph.append(row)
        elif paragraph:
            yield first, " ".join(paragraph)
            paragraph = []


def json_rows(text: str, name: str) -> Generator[tuple[int, dict[str, Any]], None, None]:
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            array = (
                " The file looks like one JSON array: jq -c '.[]' writes its lines." if text.lstrip()[0] == "[" else ""
            )
            raise ValueError(
                f"{name}, line {line}: not JSON ({what}); write one JSON object a line, without line breaks.{array}"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(
                f'{name}, line {line}: a JSON {json_type(value)}, expected an object as {{"text": "..."}}; write one '
                "object a line."
            )
        yield line, value


def table_rows(
    text: str, name: str, kind: str, columns: Sequence[str] | None
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    separator, quoting = (",", csv.QUOTE_MINIMAL) if kind == "csv" else ("\t", csv.QUOTE_NONE)
    remedy = (
        "put a cell that contains a comma or a line break in double quotes" if kind == "csv" else "a cell holds no tab"
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    header, line = None if columns is None else _header(columns, name), 1
    limit = csv.field_size_limit(2**31 - 1)  # Python's 128 KiB a cell would refuse a long text
    try:
        for cells in reader:
            first, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, name)
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{name}, line {first}: {len(cells)} cells, and the header has {len(header)} ({listing(header)}); {remedy}."
                )
            yield first, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {line}: not {kind.upper()} ({error}); {remedy}.") from None
    finally:
        csv.field_size_limit(limit)


def _header(cells: Sequence[str], name: str) -> list[str]:
    twice = sorted({cell for cell in cells if list(cells).count(cell) > 1})
    if twice:
        raise ValueError(
            f"{name}: the header has {listing(twice[:1])} more than once; give every column a name of its own, or add a header "
            "where there is none."
        )
    return list(cells)


def listing(names: Iterable[str]) -> str:
    """Field names in a message; without a header they would be the first record, so that long ones are cut."""
    return ", ".join(repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names) or "none"


def json_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
