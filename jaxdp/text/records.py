"""Records of text from a file: JSON lines, CSV, TSV or plain text.

Every reading error names the file, the line and the remedy, and is raised before any work starts: it tells the owner of the
file about his own file, on his own screen, and decides nothing that is ever released (S9 is about the errors of a run).
Messages quote field names and labels, never the text of a record; beware that the first row of a table is taken for names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdp import _validate
from jaxdp.text.rows import json_rows, json_type, listing, read_utf8, table_rows, texts

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text", ".md": "text"}
_NAME = re.compile(r"\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what: `text`, or `text` and `label`, or `prompt` and `completion`; and the unit.

    `text`, `prompt` and `completion` each name one field (`"review"`) or, in braces, put several together:
    `"{premise}\\nDoes this mean that {hypothesis}?"`. `Fields()` reads the field "text".

    Attributes:
        text: The text to model, or with `label` the text to classify.
        prompt: What the model is given; the loss does not count it. The completion follows it without a separator, so write
            one: `Fields(prompt="{mr}\\n", completion="ref")`.
        completion: What the model must write.
        label: The class of `text`: a string or an integer in the file.
        unit: Whom privacy protects: all records with the same value are one privacy unit. None: each record is one.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    unit: str | None = None

    def __post_init__(self):
        if (self.text, self.prompt, self.completion) == (None, None, None):
            object.__setattr__(self, "text", "text")
        if (self.prompt is None) != (self.completion is None) or (self.text is None) == (self.prompt is None):
            raise ValueError(
                f"{self} mixes kinds of records; name text, or text and label, or prompt and completion (both of them)."
            )
        if self.label is not None and self.text is None:
            raise ValueError(f"{self} has a label beside prompt and completion; name the text to classify as text.")
        for name, value in dataclasses.asdict(self).items():
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must name a field, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record, and where it stands in its file.

    Attributes:
        prompt: What the loss does not count: a prompt, or a text to classify; empty for a text to model.
        completion: What the loss counts: a completion, or a text to model; empty for a text to classify.
        label: The class, as a string; None if the records have none.
        unit: The privacy unit that it belongs to; None if it is one by itself.
        line: The number of its first line, from 1.
        file: The name of its file.
    """

    prompt: str
    completion: str
    label: str | None = None
    unit: str | None = None
    line: int = 0
    file: str = ""

    @property
    def place(self) -> str:
        """The start of a message about it: `reviews.jsonl, line 7`."""
        return f"{self.file or 'records'}, line {self.line}"


def read_records(
    path: str | Path,
    *,
    fields: Fields | None = None,
    format: str | None = None,
    record: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[Record]:
    """Reads the records of one file, in the order of the file.

    Args:
        path: A UTF-8 file. Its extension says what it is: `.jsonl` or `.json`, one JSON object a line; `.csv`, with quotes
            as RFC 4180; `.tsv`, without quotes, as GLUE's files; `.txt` or `.md`, plain text.
        fields: Which fields to take; `Fields()` by default. Plain text has none.
        format: "jsonl", "csv", "tsv" or "text", whatever the extension says.
        record: What one record of plain text is: a "paragraph" (the default: up to a blank line, its wrapped lines joined by
            spaces), a "line" or the "file".
        columns: The names of the columns of a CSV or TSV file that has no header.

    Returns:
        The records, at least one. Blank lines are none.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: an option does not fit the format, or the file is not what it should be; the message names the line.
    """
    path = Path(path)
    fields = Fields() if fields is None else fields
    kind = _format(path, format)
    if kind != "text" and record is not None:
        raise ValueError(f"record={record!r} is for plain text, and {path.name} is read as {kind}; leave it out.")
    if kind not in ("csv", "tsv") and columns is not None:
        raise ValueError(f"columns are for CSV and TSV, and {path.name} is read as {kind}; leave them out.")
    if kind == "text" and fields != Fields():
        raise ValueError(
            f"{path.name} is read as plain text, which has no fields; leave out {fields}, or use JSON lines."
        )
    record = _validate.one_of("record", "paragraph" if record is None else record, ("paragraph", "line", "file"))
    text = read_utf8(path)
    if kind == "text":
        records = [Record("", text, line=line, file=path.name) for line, text in texts(text, record)]
    else:
        rows = json_rows(text, path.name) if kind == "jsonl" else table_rows(text, path.name, kind, columns)
        with contextlib.closing(rows):
            records = [_record(row, fields, line, path.name) for line, row in rows]
    if not records:
        raise ValueError(f"{path} holds no record; give a file with text in it.")
    return records


def _format(path: Path, format: str | None) -> str:
    if format is not None:
        return _validate.one_of("format", format, ("jsonl", "csv", "tsv", "text"))
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path.name} has the extension {path.suffix!r}, which says nothing about its format; known are "
            f"{', '.join(FORMATS)}. Say what it is with format='jsonl', 'csv', 'tsv' or 'text'."
        )
    return FORMATS[path.suffix.lower()]


def _record(row: dict[str, Any], fields: Fields, line: int, file: str) -> Record:
    place = f"{file}, line {line}"
    label = None if fields.label is None else _token(row, fields.label, "label", place)
    unit = None if fields.unit is None else _token(row, fields.unit, "unit", place)
    if fields.text is not None:
        text = _text(row, fields.text, place)
        return Record(*(("", text) if label is None else (text, "")), label, unit, line, file)
    assert fields.prompt is not None
    assert fields.completion is not None
    prompt = _text(row, fields.prompt, place, may_be_empty=True)
    return Record(prompt, _text(row, fields.completion, place), label, unit, line, file)


def _text(row: dict[str, Any], spec: str, place: str, *, may_be_empty: bool = False) -> str:
    for name in _NAME.findall(spec) or [spec]:
        value = _value(row, name, place)
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {name!r} is a JSON {json_type(value)}, expected a string; convert it.")
        if not _is_unicode(value):
            raise ValueError(
                f"{place}: field {name!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; repair it."
            )
        if not value.strip() and not may_be_empty:
            raise ValueError(f"{place}: field {name!r} is empty; remove the record, or give it a text.")
    return _NAME.sub(lambda match: row[match[1]], spec) if _NAME.search(spec) else row[spec]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _token(row: dict[str, Any], name: str, role: str, place: str) -> str:
    """A label or unit as a string, so that 7 and "7" are one: to merge two units is safe, to part one is not."""
    value = _value(row, name, place)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(
            f"{place}: {role} field {name!r} is a JSON {json_type(value)}, expected a string or an integer."
        )
    if not str(value).strip():
        raise ValueError(f"{place}: {role} field {name!r} is empty; every record needs its {role}.")
    return str(value).strip()


def _value(row: dict[str, Any], name: str, place: str) -> Any:
    if name not in row:
        raise ValueError(
            f"{place}: no field {name!r}; it has {listing(row)}. Name fields that all records have; a table needs a header."
        )
    return row[name]
