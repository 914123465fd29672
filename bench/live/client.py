"""The client: a process of its own that sends a plan through the REST API and notes when tokens come.

`python -m bench.live.client PLAN RECORDS`. It prints `ready`, reads the start (seconds of the machine's monotonic
clock) from stdin, prints its progress as JSON lines and writes the records. Open loop: the next request is sent when it
is due, however long the answers take.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench.live.plan_file import read_plan, write_records
from bench.live.requests import PlannedRequest, RequestRecord, Status

_PROGRESS_S = 0.5
_MAX_CONNECTIONS = 1024
#: Less than servers keep idle connections: none is closed by its server while a request is on its way.
_KEEPALIVE_S = 2.0


@dataclass(slots=True)
class Progress:
    """Requests so far."""

    sent: int = 0
    ok: int = 0
    bad: int = 0


class Client:
    """Sends requests to one server. Times are relative to `start_s` on the monotonic clock."""

    def __init__(self, http: aiohttp.ClientSession, model: str, start_s: float) -> None:
        self._http = http
        self._model = model
        self._start_s = start_s
        self.progress = Progress()

    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    async def run(self, requests: Sequence[PlannedRequest], patience_s: float) -> list[RequestRecord]:
        """Send everything at its time; give up on what has not ended `patience_s` after the last was due."""
        tasks: list[asyncio.Task[RequestRecord]] = []
        for item in requests:
            delay_s = item.at_s - self.now_s()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(asyncio.create_task(self._send(item)))
        if not tasks:
            return []
        await asyncio.wait(tasks, timeout=max(0.0, requests[-1].at_s + patience_s - self.now_s()))
        for task in tasks:
            task.cancel()
        return list(await asyncio.gather(*tasks))

    async def _send(self, item: PlannedRequest) -> RequestRecord:
        record = RequestRecord(item.request_id, item.kind, item.at_s, self.now_s(), Status.UNFINISHED)
        self.progress.sent += 1
        answer = Answer()
        try:
            async with self._http.post("/v1/completions", json=self._body(item)) as response:
                if response.status != 200:
                    answer.refused(response.status, await response.text())
                else:
                    async for line in response.content:
                        answer.take(line, self.now_s())
        except (aiohttp.ClientError, ValueError) as error:  # the latter: no JSON, or a line without an end
            answer.failed(f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            answer.status, answer.error = Status.UNFINISHED, "no end within the time the benchmark waits"
        ended = answer.finish(record, item.max_tokens)
        if ended.status is Status.OK:
            self.progress.ok += 1
        else:
            self.progress.bad += 1
        return ended

    def _body(self, item: PlannedRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": item.prompt,
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "lemix": {"request_id": item.request_id, **({"reference": item.reference} if item.reference else {})},
        }


class Answer:
    """One streamed answer as it comes in."""

    def __init__(self) -> None:
        self.status = Status.FAILED
        self.error = "the stream ended early"
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._tokens: int | None = None
        self._report: dict[str, Any] = {}

    def refused(self, status_code: int, body: str) -> None:
        """An HTTP error instead of a stream. 429 and 503 are rejections, everything else a failure."""
        self.status = Status.REJECTED if status_code in (429, 503) else Status.FAILED
        self.error = f"HTTP {status_code}: {body[:300]}"

    def failed(self, error: str) -> None:
        """The connection broke."""
        self.status, self.error = Status.FAILED, error

    def take(self, line: bytes, now_s: float) -> None:
        """One line of the event stream. Raises ValueError when its data is not JSON."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            if self.status is not Status.REJECTED and not self.error.startswith("server:"):
                self.status, self.error = Status.OK, ""
            return
        event = json.loads(data)
        if "error" in event:
            self.status, self.error = Status.FAILED, f"server: {json.dumps(event['error'])[:300]}"
            return
        if event.get("choices"):  # with or without text: a token may be half a character or an end of sequence
            self._first_s = now_s if self._first_s is None else self._first_s
            self._last_s = now_s
        if event.get("usage"):
            self._tokens = int(event["usage"]["completion_tokens"])
        if event.get("lemix"):
            self._report = event["lemix"]

    def finish(self, record: RequestRecord, planned_tokens: int) -> RequestRecord:
        """The record of the request; an answer shorter than planned is a failure."""
        status, error, tokens = self.status, self.error, self._tokens or 0
        if status is Status.OK and (tokens != planned_tokens or self._first_s is None):
            status, error = Status.FAILED, f"{tokens} tokens instead of {planned_tokens}"
        return replace(
            record,
            status=status,
            error=error,
            first_token_s=self._first_s,
            last_token_s=self._last_s,
            output_tokens=tokens,
            node_id=self._report.get("node_id") or "",
            weight_steps=tuple(int(version["step"]) for version in self._report.get("weight_versions") or ()),
            staleness_s=self._report.get("staleness_s"),
            reference_loss=self._report.get("reference_loss"),
        )


async def _report(client: Client) -> None:
    while True:
        progress = client.progress
        print(json.dumps({"sent": progress.sent, "ok": progress.ok, "bad": progress.bad}), flush=True)
        await asyncio.sleep(_PROGRESS_S)


async def _main(plan_path: Path, records_path: Path) -> int:
    header, requests = read_plan(plan_path)
    connector = aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, keepalive_timeout=_KEEPALIVE_S)
    no_limit = aiohttp.ClientTimeout(total=None)  # the plan says when to give up
    async with aiohttp.ClientSession(header["url"], connector=connector, timeout=no_limit) as http:
        await (await http.get("/v1/models")).read()  # the first connection is not part of the first request
        print("ready", flush=True)
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line.strip():
            return 1  # the benchmark is gone
        client = Client(http, header["model"], float(line))
        reporter = asyncio.create_task(_report(client))
        records = await client.run(requests, header["drain_s"])
        reporter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporter
    write_records(records_path, records)
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(_main(Path(sys.argv[1]), Path(sys.argv[2]))))
