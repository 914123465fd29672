"""One piece of traffic on a cluster that runs, with online training beside it if asked for."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.live.client_process import ClientProcess, Counts
from bench.live.cpu import CpuMeter
from bench.live.plan_file import write_plan
from bench.live.requests import PlannedRequest, RequestRecord
from bench.live.training_jobs import TrainingJobs, connect
from deploy.local.cluster import LocalCluster

#: From the moment everything is ready to the first planned moment of the traffic.
_LEAD_S = 0.5
_WATCH_S = 1.0

OnProgress = Callable[[float, Counts], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """An online job whose examples never run out: these texts over and over, `batch_size` to a micro-batch and
    `accumulation` of those to an optimizer step."""

    texts: Sequence[str]
    batch_size: int = 1
    accumulation: int = 1
    num_epochs: int = 100
    learning_rate: float = 3e-4


@dataclass(frozen=True, slots=True)
class Sent:
    """What a client saw. start_s: the start of the traffic on the machine's monotonic clock. cpu_s: CPU seconds used in
    the run, by role."""

    start_s: float
    wall_s: float
    records: list[RequestRecord]
    trained_tokens: int
    cpu_s: dict[str, float]


async def send(
    cluster: LocalCluster,
    requests: Sequence[PlannedRequest],
    *,
    seconds: float,
    drain_s: float,
    plan: Path,
    backlog: Backlog | None = None,
    on_progress: OnProgress = lambda at_s, counts: None,
) -> Sent:
    """Send requests, train all the while, and return when `seconds` are over and every request has ended.

    `plan`: the client's file, beside which its records and its log come to lie. Raises LiveError when the client or a
    job fails, ClusterError when a service ends.
    """
    model = cluster.config.model_name
    write_plan(plan, url=cluster.url, model=model, drain_s=drain_s, requests=requests)
    client = ClientProcess(plan)
    async with AsyncExitStack() as stack:
        jobs = None
        if backlog is not None:
            jobs = TrainingJobs(
                connect(cluster.url),
                model,
                batch_size=backlog.batch_size,
                num_epochs=backlog.num_epochs,
                learning_rate=backlog.learning_rate,
                accumulation=backlog.accumulation,
            )
            stack.push_async_callback(jobs.close)
            file_id = await jobs.upload("backlog.jsonl", backlog.texts)
        stack.push_async_callback(client.stop)
        await client.start()
        if jobs is not None:
            await jobs.start(file_id)
        start_s = time.monotonic() + _LEAD_S
        meter = CpuMeter()
        records = await _watched(cluster, client, meter, start_s, seconds, on_progress)
        wall_s = time.monotonic() - start_s
        trained_tokens = await jobs.trained_tokens() if jobs is not None else 0
        return Sent(start_s, wall_s, records, trained_tokens, meter.totals_s())


async def _watched(
    cluster: LocalCluster,
    client: ClientProcess,
    meter: CpuMeter,
    start_s: float,
    seconds: float,
    on_progress: OnProgress,
) -> list[RequestRecord]:
    counts: dict[str, int] = {}
    processes = {**cluster.processes(), "client": client.pid, "benchmark": os.getpid()}
    sending = asyncio.create_task(client.run(start_s, counts.update))
    over = asyncio.gather(sending, asyncio.sleep(start_s + seconds - time.monotonic()))
    try:
        while not over.done():
            meter.sample(processes)
            on_progress(time.monotonic() - start_s, counts)
            cluster.check()
            await asyncio.wait((over,), timeout=_WATCH_S)
        records, _ = await over
        meter.sample(processes)
        return records
    finally:
        over.cancel()
        await asyncio.gather(sending, over, return_exceptions=True)
