"""Runs on a real cluster: one to profile a node, then one per policy on the same traffic."""

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.demo.config import DemoConfig, DemoError, PolicyRun
from bench.demo.corpus import Corpus, pieces
from bench.demo.event_log import read_event_log
from bench.demo.profile import Promise, newest_profile, profile_grid, promise
from bench.demo.records import RunRecord
from bench.demo.workload import Feedback, feedback_plan, mean_lengths, warmup_plan
from bench.live.client_process import ClientProcess, Counts
from bench.live.cpu import CpuMeter
from bench.live.plan_file import write_plan
from bench.live.requests import PlannedRequest, RequestRecord
from bench.live.training_jobs import TrainingJobs, connect
from bench.machine import usable_cores
from deploy.local.cluster import LocalCluster
from deploy.local.settings import LocalClusterConfig
from services.profile_messages import latency_from_profile

_MODEL_NAME = "demo"
#: From the moment everything is ready to the first planned moment of the traffic.
_LEAD_S = 1.0
_WATCH_S = 1.0
_WARMUP_DRAIN_S = 60.0

OnProgress = Callable[[float, Counts], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run and what went wrong in it."""

    record: RunRecord
    problems: list[str]


class Runner:
    """Starts and stops clusters under `config.out`."""

    def __init__(self, config: DemoConfig, corpus: Corpus, model: Path) -> None:
        self._config = config
        self._corpus = corpus
        self._model = model
        self._profiles = config.out / "profiles"

    async def profile(self) -> Promise:
        """Measure one node, for all are alike; what its profile predicts becomes capacity and SLO.

        Every later cluster takes this profile for each of its nodes. Old measurements are dropped first: the promise
        is about the machine as it is now.
        """
        shutil.rmtree(self._profiles, ignore_errors=True)
        async with AsyncExitStack() as stack:
            await self._start_cluster(stack, "profile", policy="lemix", nodes=1, core={})
        config = self._config
        profile = newest_profile(self._profiles, config.cluster.stages)
        mean_prompt, mean_output = mean_lengths(config.traffic)
        return promise(
            profile.profile_id,
            latency_from_profile(profile),
            mean_prompt=mean_prompt,
            mean_output=mean_output,
            reference_tokens=config.traffic.reference_tokens,
            max_batch=config.cluster.max_batch,
            slo_units=config.slo_units,
            core_share=min(1.0, usable_cores() / (config.cluster.nodes * config.cluster.stages)),
        )

    async def run(
        self,
        policy: PolicyRun,
        repetition: int,
        requests: Sequence[PlannedRequest],
        promised: Promise,
        on_progress: OnProgress,
    ) -> Outcome:
        """One run under one policy. Raises DemoError or ClusterError when it could not be carried through."""
        core = {
            "sync_every_steps": self._sync_every_steps(policy),
            "default_slo": {"ttft_s": promised.slo.ttft_s, "tpot_s": promised.slo.tpot_s},
        }
        name = f"{policy.name}-{repetition}"
        async with AsyncExitStack() as stack:
            cluster = await self._start_cluster(
                stack, name, policy=policy.policy, nodes=self._config.cluster.nodes, core=core
            )
            await self._warm_up(cluster, name, repetition)
            training = self._config.training
            jobs = TrainingJobs(
                connect(cluster.url),
                _MODEL_NAME,
                batch_size=training.batch_size,
                num_epochs=training.num_epochs,
                learning_rate=training.learning_rate,
            )
            stack.push_async_callback(jobs.close)
            measured = await self._measure(cluster, jobs, name, requests, on_progress)
        return self._outcome(policy.name, name, measured)

    async def _start_cluster(
        self, stack: AsyncExitStack, name: str, *, policy: str, nodes: int, core: dict[str, Any]
    ) -> LocalCluster:
        config = self._config
        directory = self._directory(name)
        shutil.rmtree(directory, ignore_errors=True)  # a ledger from an earlier run would still hold its jobs
        directory.mkdir(parents=True)
        cluster = LocalCluster(
            LocalClusterConfig(
                model_path=self._model,
                directory=directory,
                num_nodes=nodes,
                num_stages=config.cluster.stages,
                policy=policy,
                model_name=_MODEL_NAME,
                core=core,
                node={"max_batch": config.cluster.max_batch},
                scheduler={"feedback_learning_rate": config.training.learning_rate},
                profiler={"grid": profile_grid(config.training)},
                profiles_directory=self._profiles,
                event_log=self._event_log(name),
                start_timeout_s=config.cluster.start_timeout_s,
            )
        )
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        return cluster

    async def _warm_up(self, cluster: LocalCluster, name: str, repetition: int) -> None:
        requests = warmup_plan(self._config.traffic, self._corpus, self._config.seed + repetition)
        client = self._client(cluster, f"{name}/warmup", requests, _WARMUP_DRAIN_S)
        try:
            await client.start()
            records = await client.run(time.monotonic(), lambda counts: None)
        finally:
            await client.stop()
        errors = [record.error for record in records if record.error]
        if errors:
            raise DemoError(f"{name}: {len(errors)} of {len(records)} warm-up requests failed: {errors[0]}")

    def _client(
        self, cluster: LocalCluster, name: str, requests: Sequence[PlannedRequest], drain_s: float
    ) -> ClientProcess:
        plan = self._directory(name).with_suffix(".plan.jsonl")
        write_plan(plan, url=cluster.url, model=_MODEL_NAME, drain_s=drain_s, requests=requests)
        return ClientProcess(plan)

    async def _measure(
        self,
        cluster: LocalCluster,
        jobs: TrainingJobs,
        name: str,
        requests: Sequence[PlannedRequest],
        on_progress: OnProgress,
    ) -> "_Measured":
        config = self._config
        texts = {
            kind: pieces(split.training, config.training.piece_tokens, config.seed)
            for kind, split in (("docs", self._corpus.docs), ("code", self._corpus.code))
        }
        share = config.training.share
        feedback = None if share is None else feedback_plan(requests, share, texts)
        files = [await jobs.upload(f"{kind}.jsonl", items) for kind, items in texts.items()] if share is None else []
        client = self._client(cluster, f"{name}/traffic", requests, config.drain_s)
        meter = CpuMeter()
        tasks: list[asyncio.Future[Any]] = []
        try:
            await client.start()
            start_s = time.monotonic() + _LEAD_S
            counts: dict[str, int] = {}
            sending = asyncio.create_task(client.run(start_s, counts.update))
            working = self._train(jobs, files, start_s) if feedback is None else self._feed(jobs, feedback, start_s)
            training = asyncio.create_task(working)
            tasks += [sending, training]
            await asyncio.sleep(start_s - time.monotonic())
            processes = {**cluster.processes(), "client": client.pid, "demo": os.getpid()}
            length_s = start_s + config.traffic.seconds - time.monotonic()
            over = asyncio.gather(sending, asyncio.sleep(length_s))
            tasks.append(over)
            while not over.done():
                meter.sample(processes)
                on_progress(time.monotonic() - start_s, counts)
                cluster.check()
                if training.done():
                    training.result()  # raises what stopped it
                await asyncio.wait((over,), timeout=_WATCH_S)
            meter.sample(processes)
            wall_s = time.monotonic() - start_s
            records, _ = await over
            await training
            return _Measured(start_s, wall_s, records, await jobs.trained_tokens(), meter.totals_s())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.stop()

    def _sync_every_steps(self, policy: PolicyRun) -> int:
        training = self._config.training
        if training.share is None or policy.sync_every_steps == 0:
            return policy.sync_every_steps
        # The feedback job begins without examples, from which no k can be derived.
        return training.feedback_sync_every_steps

    async def _feed(self, jobs: TrainingJobs, feedback: Sequence[Feedback], start_s: float) -> None:
        """Feedback as it comes."""
        for item in feedback:
            await asyncio.sleep(max(0.0, start_s + item.at_s - time.monotonic()))
            await jobs.give(item.text)

    async def _train(self, jobs: TrainingJobs, files: Sequence[str], start_s: float) -> None:
        """The documentation job from the start, the source code job from the drift; the backlog never empties."""
        traffic = self._config.traffic
        await asyncio.sleep(max(0.0, start_s - time.monotonic()))
        before = await jobs.start(files[0])
        await asyncio.sleep(max(0.0, start_s + traffic.drift * traffic.seconds - time.monotonic()))
        await jobs.start(files[1])
        await jobs.cancel(before)

    def _outcome(self, policy: str, name: str, measured: "_Measured") -> Outcome:
        log = read_event_log(self._event_log(name), measured.start_s)
        traffic = self._config.traffic
        record = RunRecord(
            policy=policy,
            planned_s=traffic.seconds,
            wall_s=measured.wall_s,
            drift_s=traffic.drift * traffic.seconds,
            requests=measured.requests,
            ops=[op for op in log.ops if op.end_s > 0.0 and op.begin_s < measured.wall_s],
            spans=log.spans,
            trained_tokens=measured.trained_tokens,
            cpu_s=measured.cpu_s,
            cores=usable_cores(),
            training_loss=log.training_loss,
        )
        bad = [item for item in measured.requests if item.error]
        problems = [f"{name}: {item.request_id} {item.status.value}: {item.error}" for item in bad]
        problems += [f"{name}: {text}" for at_s, text in log.lost_nodes if 0.0 <= at_s <= measured.wall_s]
        if log.dropped:
            problems.append(f"{name}: the scheduler left {log.dropped} entries out of its event log")
        if not record.ops:
            problems.append(f"{name}: the scheduler's event log holds no operations")
        return Outcome(record, problems)

    def _directory(self, name: str) -> Path:
        return self._config.out / "runs" / name

    def _event_log(self, name: str) -> Path:
        return self._directory(name) / "events.jsonl"


@dataclass(frozen=True, slots=True)
class _Measured:
    start_s: float
    wall_s: float
    requests: list[RequestRecord]
    trained_tokens: int
    cpu_s: dict[str, float]
