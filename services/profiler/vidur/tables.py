"""Vidur's tables of one GPU: `mlp.csv`, `attention.csv` and `send_recv.csv`, in milliseconds, of one layer."""

import csv
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import scipy.optimize

#: Matrix products of one layer, and what runs between them. A layer adds its input twice.
MATMULS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
ELEMENTWISE = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add", "add")
#: The product whose time per column of its matrix stands for that of the head: it has the same input.
HEAD_LIKE = "mlp_up_proj"
EMBEDDING = "emb"
_MS = 1e-3
_MAX_ROWS = 2_000_000


class TableError(ValueError):
    """A table cannot be used; the message names the file, and the column or line."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Shortest, median and longest time of an operation, seconds."""

    least: float
    median: float
    most: float

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.least + other.least, self.median + other.median, self.most + other.most)

    def times(self, factor: float) -> "Spread":
        """All of them longer by a factor."""
        return Spread(self.least * factor, self.median * factor, self.most * factor)

    @classmethod
    def exactly(cls, duration_s: float) -> "Spread":
        """Of something derived, not timed."""
        return cls(duration_s, duration_s, duration_s)


@dataclass(frozen=True, slots=True)
class Curve:
    """Times over a size, rising; between two of them a straight line, beyond the last in proportion."""

    sizes: Sequence[int]
    times: Sequence[Spread]

    def at(self, size: float) -> Spread:
        """Times at a size; the first one's for anything smaller."""
        place = bisect_left(self.sizes, size)
        if place == 0:
            return self.times[0]
        if place == len(self.sizes):
            return self.times[-1].times(size / self.sizes[-1])
        share = (size - self.sizes[place - 1]) / (self.sizes[place] - self.sizes[place - 1])
        return self.times[place - 1].times(1.0 - share) + self.times[place].times(share)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer: a constant and seconds per unit of work, fitted to the table's rows.

    prefill: per new token, per pair of new tokens, and per pair of a new and a cached token; apart, because a kernel
    may compute pairs that the causal mask hides. decode: per context token of all sequences.
    """

    prefill: tuple[float, float, float, float]
    decode: tuple[float, float]
    prefill_error: float
    decode_error: float

    def prefill_s(self, batch: float, length: float, cached: float) -> float:
        """`batch` sequences of `length` new tokens behind `cached` others."""
        constant, per_token, per_own, per_cached = self.prefill
        return constant + batch * length * (per_token + per_own * length + per_cached * cached)

    def decode_s(self, batch: float, context: float) -> float:
        """One token of each of `batch` sequences with `context` tokens before it."""
        constant, per_token = self.decode
        return constant + per_token * batch * context


def read_mlp(path: Path, hidden: int, intermediate: int) -> dict[str, Curve]:
    """Times by operation over the number of tokens, on one GPU. Raises TableError, also for another model's table."""
    operations = {*MATMULS, *ELEMENTWISE, EMBEDDING}
    needed = ["n_embd", "n_expanded_embd", "num_tokens", "num_tensor_parallel_workers"]
    rows = _read(path, needed + [f"{name}.{part}" for name in sorted(operations) for part in ("min", "median", "max")])
    found: dict[str, dict[int, list[Spread]]] = {name: defaultdict(list) for name in operations}
    for line, row in rows:
        if _number(path, line, row, "num_tensor_parallel_workers") != 1:
            continue
        shape = _number(path, line, row, "n_embd"), _number(path, line, row, "n_expanded_embd")
        if shape != (hidden, intermediate):
            raise TableError(f"{path}: line {line}: is of a model of widths {shape}, not {(hidden, intermediate)}")
        tokens = int(_number(path, line, row, "num_tokens"))
        for name in operations:
            found[name][tokens].append(_spread(path, line, row, name))
    curves = {name: _curve(by_tokens) for name, by_tokens in found.items()}
    if not curves[EMBEDDING].sizes:
        raise TableError(f"{path}: has no row with num_tensor_parallel_workers 1")
    return curves


def read_send_recv(path: Path) -> Curve:
    """Time over bytes between two GPUs of one machine. Raises TableError."""
    parts = [f"send_recv.{part}" for part in ("min", "median", "max")]
    found: dict[int, list[Spread]] = defaultdict(list)
    for line, row in _read(path, [*parts, "size", "devices_per_node"]):
        if _number(path, line, row, "devices_per_node") > 1:
            found[int(_number(path, line, row, "size"))].append(_spread(path, line, row, "send_recv"))
    if not found:
        raise TableError(f"{path}: has no row with devices_per_node above 1")
    return _curve(found)


def read_attention(path: Path, hidden: int) -> Attention:
    """Fits to the rows of prefill and of decode on one GPU. Raises TableError, also for another model's table.

    Takes Vidur's columns, or of an extract `phase` and `attn_ms_median` in their place, which need not name model and
    number of GPUs.
    """
    sizes = ["batch_size", "prefill_chunk_size", "kv_cache_size"]
    prefill: list[tuple[tuple[float, ...], float]] = []
    decode: list[tuple[tuple[float, ...], float]] = []
    rows = _read(path, sizes, ("phase", "attn_ms_median"), ("is_prefill", "attn_prefill.median", "attn_decode.median"))
    for line, row in rows:
        if "num_tensor_parallel_workers" in row and _number(path, line, row, "num_tensor_parallel_workers") != 1:
            continue
        if "n_embd" in row and (width := _number(path, line, row, "n_embd")) != hidden:
            raise TableError(f"{path}: line {line}: is of a model of width {width:g}, not {hidden}")
        batch, chunk, cached = (_number(path, line, row, name) for name in sizes)
        is_prefill = (row.get("phase") or "") == "prefill" or (row.get("is_prefill") or "").lower() == "true"
        column = "attn_ms_median"
        if column not in row:
            column = "attn_prefill.median" if is_prefill else "attn_decode.median"
        duration_s = _number(path, line, row, column) * _MS
        if duration_s <= 0.0:
            raise TableError(f"{path}: line {line}, column {column}: a time must be above 0")
        if is_prefill:
            tokens = batch * chunk
            prefill.append(((1.0, tokens, tokens * chunk, tokens * cached), duration_s))
        elif cached:
            decode.append(((1.0, batch * cached), duration_s))
    (constant, token, own, behind), prefill_error = _fit(path, "prefill", prefill)
    (constant_decode, context), decode_error = _fit(path, "decode", decode)
    return Attention((constant, token, own, behind), (constant_decode, context), prefill_error, decode_error)


def _fit(path: Path, phase: str, rows: Sequence[tuple[tuple[float, ...], float]]) -> tuple[tuple[float, ...], float]:
    """Coefficients from 0 on with the smallest squared relative error, and their mean absolute relative error."""
    if not rows:
        raise TableError(f"{path}: has no row of {phase} on one GPU")
    features = np.array([row for row, _ in rows])
    measured = np.array([duration for _, duration in rows])
    scale = np.maximum(features.max(axis=0), 1.0)
    if np.linalg.matrix_rank(features / scale) < features.shape[1]:
        raise TableError(f"{path}: the sizes in the {len(rows)} rows of {phase} are too few to fit their times")
    solution, _ = scipy.optimize.nnls(features / scale / measured[:, None], np.ones(len(measured)))
    coefficients = solution / scale
    error = float(np.mean(np.abs(features @ coefficients - measured) / measured))
    return tuple(float(value) for value in coefficients), error


def _curve(found: Mapping[int, Sequence[Spread]]) -> Curve:
    sizes = sorted(found)
    return Curve(sizes, [_middle(found[size]) for size in sizes])


def _middle(spreads: Sequence[Spread]) -> Spread:
    return Spread(
        median(spread.least for spread in spreads),
        median(spread.median for spread in spreads),
        median(spread.most for spread in spreads),
    )


def _spread(path: Path, line: int, row: Mapping[str, str], name: str) -> Spread:
    least, middle, most = (_number(path, line, row, f"{name}.{part}") * _MS for part in ("min", "median", "max"))
    if not 0.0 <= least <= middle <= most:
        raise TableError(f"{path}: line {line}, columns {name}: min, median and max must rise from 0 on")
    return Spread(least, middle, most)


def _read(path: Path, needed: Iterable[str], *either: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows with their lines. Every column of `needed` must be there, and all of one of `either`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            missing = [name for name in needed if name not in columns]
            if either and not any(columns.issuperset(names) for names in either):
                missing += [name for name in either[-1] if name not in columns]
            if missing:
                raise TableError(f"{path}: lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
            rows: list[tuple[int, dict[str, str]]] = []
            for row in reader:
                if len(rows) >= _MAX_ROWS:
                    raise TableError(f"{path}: has more than {_MAX_ROWS} rows")
                rows.append((reader.line_num, row))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _number(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TableError(f"{path}: line {line}, column {column}: {text!r} is not a number")
    return value
