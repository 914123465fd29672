"""Clusters of this benchmark and runs of traffic on them."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.fidelity.compare import finite
from bench.fidelity.config import FidelityConfig
from bench.live.errors import LiveError
from bench.live.requests import PlannedRequest, RequestRecord, Status
from bench.live.run import Backlog, Sent, send
from bench.machine import usable_cores
from deploy.local.cluster import LocalCluster
from deploy.local.settings import LocalClusterConfig
from services.simulator.metrics import quantile

MODEL_NAME = "fidelity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a cluster of this benchmark is; settings beyond those of every local cluster."""

    name: str
    model: Path
    nodes: int
    stages: int
    core: Mapping[str, Any] = field(default_factory=dict)
    node: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    profiler: Mapping[str, Any] = field(default_factory=dict)
    profiles: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Traffic: what is sent first and not counted, what is sent, and what is trained meanwhile."""

    name: str
    requests: Sequence[PlannedRequest]
    warmup: Sequence[PlannedRequest]
    seconds: float
    drain_s: float
    backlog: Backlog | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A run that is over. start_s: of its traffic, on the clock of the event log."""

    start_s: float
    wall_s: float
    records: list[RequestRecord]
    event_log: Path
    #: Share of the machine's CPU time in the run, by role.
    cpu_share: dict[str, float]

    @property
    def problems(self) -> list[str]:
        """Requests that failed; what was refused for overload is counted, not a problem."""
        return [
            f"{record.request_id} {record.status.value}: {record.error}"
            for record in self.records
            if record.status not in (Status.OK, Status.REJECTED)
        ]

    def client_figures(self) -> dict[str, Any]:
        """What the client saw: the same and the way through gateway and HTTP."""
        ttfts = sorted(math.inf if record.ttft_s is None else record.ttft_s for record in self.records)
        return {
            "requests": len(self.records),
            "ok": sum(record.status is Status.OK for record in self.records),
            "rejected": sum(record.status is Status.REJECTED for record in self.records),
            "ttft_p50_s": finite(quantile(ttfts, 0.5)),
            "ttft_p95_s": finite(quantile(ttfts, 0.95)),
        }


class Started:
    """A cluster that runs."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self._cluster = cluster
        self._directory = directory

    async def run(self, run: Run, on_progress: Callable[[float], None]) -> Done:
        """Warm up, then send and train. Raises LiveError, ClusterError."""
        if run.warmup:
            warmed = await self._send(run, run.warmup, 0.0, f"{run.name}-warmup", None)
            bad = [record.error for record in warmed.records if record.error]
            if bad:
                raise LiveError(f"{run.name}: {len(bad)} of {len(run.warmup)} warm-up requests failed: {bad[0]}")
        sent = await self._send(run, run.requests, run.seconds, run.name, run.backlog, on_progress)
        cpu_time_s = sent.wall_s * usable_cores()
        shares = {role: used_s / cpu_time_s for role, used_s in sorted(sent.cpu_s.items())}
        return Done(sent.start_s, sent.wall_s, sent.records, event_log(self._directory), shares)

    async def _send(
        self,
        run: Run,
        requests: Sequence[PlannedRequest],
        seconds: float,
        name: str,
        backlog: Backlog | None,
        on_progress: Callable[[float], None] = lambda at_s: None,
    ) -> Sent:
        return await send(
            self._cluster,
            requests,
            seconds=seconds,
            drain_s=run.drain_s,
            plan=self._directory / f"{name}.plan.jsonl",
            backlog=backlog,
            on_progress=lambda at_s, counts: on_progress(at_s),
        )


async def started(stack: AsyncExitStack, config: FidelityConfig, cluster: Cluster) -> Started:
    """Start a cluster, which the stack stops. Raises ClusterError."""
    directory = config.out / "runs" / cluster.name
    shutil.rmtree(directory, ignore_errors=True)  # a ledger from an earlier run would still hold its jobs
    directory.mkdir(parents=True)
    local = LocalCluster(
        LocalClusterConfig(
            model_path=cluster.model,
            directory=directory,
            num_nodes=cluster.nodes,
            num_stages=cluster.stages,
            policy="lemix",
            model_name=MODEL_NAME,
            core=cluster.core,
            node=cluster.node,
            scheduler=cluster.scheduler,
            profiler=cluster.profiler,
            profiles_directory=cluster.profiles,
            event_log=event_log(directory),
            start_timeout_s=config.start_timeout_s,
        )
    )
    stack.push_async_callback(local.stop)
    await local.start()
    return Started(local, directory)


def event_log(directory: Path) -> Path:
    """Of the cluster with this run directory."""
    return directory / "events.jsonl"
