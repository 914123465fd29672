"""Request traces from CSV files with the columns arrival_s,prompt_tokens,output_tokens.

A further column session_id is optional: rows with the same one are the turns of a conversation, in order.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


class TraceError(ValueError):
    """The file cannot be used; the message is one line that names file, line and field."""


class TraceRow(NamedTuple):
    """One request; the prompt of a turn holds the turns before it. line: of the file, 0 without one."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session_id: str = ""
    line: int = 0


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRow]:
    """Rows in the file's order, at most `limit`. Raises TraceError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _rows(path, csv.DictReader(file, skipinitialspace=True), limit)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from error


def _rows(path: Path, reader: "csv.DictReader[str]", limit: int | None) -> list[TraceRow]:
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise TraceError(f"{path}: line 1: column {missing[0]!r} is missing; need {','.join(COLUMNS)}")
    rows: list[TraceRow] = []
    for raw in reader:
        if limit is not None and len(rows) >= limit:
            break
        if None in raw:
            raise TraceError(f"{path}: line {reader.line_num}: more fields than the header has")
        row = _row(f"{path}: line {reader.line_num}", raw)._replace(line=reader.line_num)
        if rows and row.arrival_s < rows[-1].arrival_s:
            earlier = f"{row.arrival_s:g} after {rows[-1].arrival_s:g}"
            raise TraceError(f"{path}: line {reader.line_num}: column 'arrival_s' goes back in time ({earlier})")
        rows.append(row)
    if not rows:
        raise TraceError(f"{path}: no rows")
    return rows


def _row(place: str, raw: Mapping[str, str | None]) -> TraceRow:
    arrival_s, prompt, output = (
        _number(f"{place}: column {name!r}", raw[name], least) for name, least in zip(COLUMNS, (0, 1, 1), strict=True)
    )
    for name, value in zip(COLUMNS[1:], (prompt, output), strict=True):
        if value != int(value):
            raise TraceError(f"{place}: column {name!r} must be a whole number, got {value:g}")
    return TraceRow(arrival_s, int(prompt), int(output), raw.get("session_id") or "")


def _number(place: str, text: str | None, least: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise TraceError(f"{place} is no number: {text!r}") from None
    if not math.isfinite(value) or value < least:
        raise TraceError(f"{place} must be at least {least}, got {value:g}")
    return value
