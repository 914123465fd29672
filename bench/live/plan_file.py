"""The plan as a file for the client process, and the client's records as a file for the benchmark."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.live.requests import PlannedRequest, RequestRecord, Status


def write_plan(path: Path, *, url: str, model: str, drain_s: float, requests: Sequence[PlannedRequest]) -> None:
    """Everything the client needs to know."""
    header = {"url": url, "model": model, "drain_s": drain_s}
    lines = [json.dumps(header), *(json.dumps(asdict(item)) for item in requests)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_plan(path: Path) -> tuple[dict[str, Any], list[PlannedRequest]]:
    """(header, requests) of `write_plan`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0]), [PlannedRequest(**json.loads(line)) for line in lines[1:]]


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON object per request."""
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[RequestRecord]:
    """Records of `write_records`."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        values["status"] = Status(values["status"])
        values["weight_steps"] = tuple(values["weight_steps"])
        records.append(RequestRecord(**values))
    return records
