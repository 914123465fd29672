"""Synchronisation of weights between nodes: snapshots for peers, and applying theirs."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.node_agent.checkpoints import Checkpointer
from services.node_agent.combine import Replica, write_copy, write_mean
from services.node_agent.convert import adapter_from_proto
from services.node_agent.engine.training_ops import AdapterSpec
from services.node_agent.engine.weight_ops import PART_SEPARATOR, LoadWeights, Snapshot, round_of
from services.node_agent.loop import AgentLoop
from services.node_agent.peer_weights import FetchedReplica, fetch_replica
from services.node_agent.scratch import ScratchFolder
from services.node_agent.tensor_file import TensorFile
from services.node_agent.weight_ops import WeightOp

_log = structlog.get_logger()

_KEPT_ROUNDS = 2
_MAX_TASKS = 4
_MAX_FETCHES = 4
#: Synchronisations of this name hand out a checkpoint instead of a snapshot.
CHECKPOINT_PREFIX = "checkpoint/"

_MODES: dict[int, str] = {scheduler_pb2.SYNC_MODE_REPLACE: "replace", scheduler_pb2.SYNC_MODE_AVERAGE: "average"}


@dataclass(slots=True)
class KeptSnapshot:
    """A snapshot peers may fetch. trained_unix_s: newest optimizer step in it; None: never trained."""

    replica: Replica
    files: list[TensorFile]
    trained_unix_s: float | None

    def close(self) -> None:
        """Unmap the files; the engine removes them."""
        for file in self.files:
            file.close()


class WeightSync:
    """Runs the phases of synchronisations, one at a time; a failed one leaves the weights as they were.

    `report` is called at the end of every phase.
    """

    def __init__(
        self,
        *,
        loop: AgentLoop,
        address: Callable[[], str],
        report: Callable[[scheduler_pb2.SyncFinished], None],
        timeout_s: float,
        checkpoints: Checkpointer | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._loop = loop
        self._address = address
        self._report = report
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._snapshots: OrderedDict[str, KeptSnapshot] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_applied = 0
        self._folder = ScratchFolder("weights")

    async def close(self) -> None:
        """Give up what is running and remove the files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._snapshots:
            self._snapshots.popitem()[1].close()
        self._folder.remove()

    def snapshot(self, sync_id: str) -> KeptSnapshot:
        """The snapshot taken for a synchronisation. Raises LemixError NOT_FOUND."""
        snapshot = self._snapshots.get(sync_id)
        if snapshot is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"this node holds no snapshot for synchronisation {sync_id}")
        return snapshot

    @contextmanager
    def handed_out(self, sync_id: str) -> Iterator[KeptSnapshot]:
        """What peers get for a synchronisation: the snapshot taken for it, or the checkpoint it names.

        Raises LemixError NOT_FOUND, CONFLICT.
        """
        if self._checkpoints is None or not sync_id.startswith(CHECKPOINT_PREFIX):
            yield self.snapshot(sync_id)
            return
        paths, trained_unix_s = self._checkpoints.replica(sync_id.removeprefix(CHECKPOINT_PREFIX))
        files: list[TensorFile] = []
        try:
            for path in paths:
                files.append(TensorFile.open(path))
            yield KeptSnapshot(Replica(self._address(), files), files, trained_unix_s)
        finally:
            for file in files:
                file.close()

    def start_snapshot(self, command: scheduler_pb2.TakeSnapshot) -> None:
        """Begin phase one."""
        self._start(command.sync_id, self._take_all(command), snapshot_only=True)

    def start_apply(self, command: scheduler_pb2.ApplyWeights) -> None:
        """Begin phase two."""
        self._start(command.sync_id, self._apply_all(command), snapshot_only=False)

    # ------------------------------------------------------------- phases

    def _start(self, sync_id: str, phase: Coroutine[None, None, None], *, snapshot_only: bool) -> None:
        if len(self._tasks) >= _MAX_TASKS:
            phase.close()
            error = LemixError(ErrorCode.OVERLOADED, f"{_MAX_TASKS} synchronisations are under way on this node")
            self._finished(sync_id, snapshot_only, error)
            return
        task = asyncio.create_task(self._run(sync_id, phase, snapshot_only=snapshot_only))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, sync_id: str, phase: Coroutine[None, None, None], *, snapshot_only: bool) -> None:
        error: LemixError | None = None
        try:
            await phase
        except LemixError as caught:
            error = caught
        except TimeoutError:
            message = f"the peers' weights did not arrive within {self._timeout_s:g} s"
            error = LemixError(ErrorCode.DEADLINE_EXCEEDED, message)
        except (OSError, ValueError) as caught:
            error = LemixError(ErrorCode.INTERNAL, f"{type(caught).__name__}: {caught}")
        self._finished(sync_id, snapshot_only, error)

    def _finished(self, sync_id: str, snapshot_only: bool, error: LemixError | None) -> None:
        step = self._loop.ages.newest_step
        message = scheduler_pb2.SyncFinished(sync_id=sync_id, weight_step=step, snapshot_only=snapshot_only)
        if error is not None:
            _log.warning("synchronisation failed", sync=sync_id, snapshot_only=snapshot_only, error=str(error))
            message.error.CopyFrom(error.to_proto())
        self._report(message)

    async def _take_all(self, command: scheduler_pb2.TakeSnapshot) -> None:
        if not command.skip_weights:
            await self._take(command.sync_id, None)
        for held in command.adapters:
            spec = self._loop.adapters.held.get(held.adapter_id)
            if spec is not None:
                await self._unless_deleted(spec.adapter_id, self._take(_part_of(command.sync_id, spec), spec))

    async def _apply_all(self, command: scheduler_pb2.ApplyWeights) -> None:
        sync_id = command.sync_id
        if not command.skip_weights:
            await self._apply(sync_id, command.mode, command.source_addresses, None)
        for item in command.adapters:
            spec = adapter_from_proto(item.adapter.adapter_id, item.adapter.lora, isolated=item.adapter.isolated)
            await self._unless_deleted(spec.adapter_id, self._apply_adapter(_part_of(sync_id, spec), item, spec))
        if self._checkpoints is not None and sync_id.startswith(CHECKPOINT_PREFIX):
            # Or a crash would bring the older weights back. They are in place, whether that succeeds or not.
            await self._checkpoints.save_or_owe("publish")

    async def _apply_adapter(self, name: str, item: scheduler_pb2.ApplyAdapter, spec: AdapterSpec) -> None:
        try:
            self._loop.adapters.expect(spec)
            await self._apply(name, item.mode, item.source_addresses, spec)
        finally:
            self._loop.give_up_adapter(spec.adapter_id)

    async def _unless_deleted(self, adapter_id: str, part: Coroutine[None, None, None]) -> None:
        """An adapter's part of a phase. One that was deleted meanwhile does not fail the round of the others."""
        try:
            await part
        except LemixError as error:
            if not self._loop.adapters.is_unwanted(adapter_id):
                raise
            _log.info("adapter left out of a synchronisation", adapter=adapter_id, reason=error.message)

    async def _take(self, sync_id: str, adapter: AdapterSpec | None) -> None:
        """Copy the weights, or an adapter's."""
        used = () if adapter is None else (adapter.adapter_id,)
        weight_op = WeightOp(False, lambda op: Snapshot(op.op_id, op.version, sync_id, adapter), adapter_ids=used)
        await self._loop.run_weight_op(f"{sync_id}/snapshot", weight_op)
        _check(weight_op, "the snapshot failed")
        files: list[TensorFile] = []
        try:
            for result in weight_op.results:
                files.append(TensorFile.open(Path(result.weights_path)))
        except BaseException:
            for file in files:
                file.close()
            raise
        of_model = None if adapter is not None and adapter.isolated else self._loop.ages.at(weight_op.version)
        trained_unix_s = self._loop.adapters.newest_step("" if adapter is None else adapter.adapter_id, of_model)
        self._keep(sync_id, KeptSnapshot(Replica(self._address(), files), files, trained_unix_s))

    def _keep(self, sync_id: str, snapshot: KeptSnapshot) -> None:
        replaced = self._snapshots.pop(sync_id, None)
        if replaced is not None:
            replaced.close()
        self._snapshots[sync_id] = snapshot
        rounds = list(dict.fromkeys(round_of(name) for name in self._snapshots))
        for name in [name for name in self._snapshots if round_of(name) in rounds[:-_KEPT_ROUNDS]]:
            self._snapshots.pop(name).close()

    async def _apply(self, sync_id: str, mode: int, addresses: Sequence[str], adapter: AdapterSpec | None) -> None:
        """Change the weights, or an adapter's. addresses: host:port of the peers whose snapshots are used."""
        name = _MODES.get(mode)
        peers = sorted(set(addresses) - {self._address()})
        if name is None or not peers or (name == "replace" and len(peers) != 1):
            raise LemixError(ErrorCode.INVALID_REQUEST, f"{name or mode} cannot use {len(peers)} peers")
        async with self._lock:
            self._num_applied += 1
            path = self._folder.path / f"combined-{self._num_applied}.safetensors"
            try:
                async with asyncio.timeout(self._timeout_s):
                    trained_unix_s = await self._combine(sync_id, name, peers, path)
                replace = name == "replace"
                weight_op = WeightOp(
                    True,
                    lambda op: LoadWeights(op.op_id, op.version, sync_id, str(path), name, op.oldest_version, adapter),
                    lambda before: _trained(before, trained_unix_s, adapter, replace=replace),
                    settles=sync_id.startswith(CHECKPOINT_PREFIX),
                    adapter_ids=() if adapter is None else (adapter.adapter_id,),
                )
                await self._loop.run_weight_op(f"{sync_id}/apply", weight_op)
                _check(weight_op, "the weights were not changed")
                self._loop.adapters.loaded(adapter, trained_unix_s)
            finally:
                path.unlink(missing_ok=True)

    async def _combine(self, sync_id: str, mode: str, peers: Sequence[str], path: Path) -> float | None:
        """Fetch the peers' snapshots and write one file; returns when the newest step in them was made."""
        own = self.snapshot(sync_id) if mode == "average" else None
        fetched = await self._fetch(sync_id, peers)
        try:
            if own is None:
                await asyncio.to_thread(write_copy, path, fetched[0].replica)
            else:
                await asyncio.to_thread(write_mean, path, [own.replica, *(peer.replica for peer in fetched)])
            return _latest(*(peer.trained_unix_s for peer in fetched))
        finally:
            for peer in fetched:
                peer.close()

    async def _fetch(self, sync_id: str, peers: Sequence[str]) -> list[FetchedReplica]:
        """All peers' snapshots in the order of `peers`, or none and the first error."""
        slots = asyncio.Semaphore(_MAX_FETCHES)

        async def fetch(index: int, address: str) -> FetchedReplica:
            async with slots:
                return await fetch_replica(address, sync_id, self._folder.path / f"peer-{index}")

        tasks = [asyncio.create_task(fetch(index, address)) for index, address in enumerate(peers)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, FetchedReplica):
                    outcome.close()
            raise


def _part_of(sync_id: str, adapter: AdapterSpec) -> str:
    """The name of an adapter's part in a round."""
    return f"{sync_id}{PART_SEPARATOR}{adapter.adapter_id}"


def _trained(before: float | None, loaded: float | None, adapter: AdapterSpec | None, *, replace: bool) -> float | None:
    """When the newest step in the served model was made, after a change of the weights or of an adapter."""
    if adapter is not None and adapter.isolated:
        return before
    return loaded if replace and adapter is None else _latest(before, loaded)


def _latest(*times: float | None) -> float | None:
    known = [time for time in times if time is not None]
    return max(known) if known else None


def _check(weight_op: WeightOp, what: str) -> None:
    """Raises LemixError INTERNAL with the first stage's error."""
    for stage, result in enumerate(weight_op.results):
        if result.error:
            raise LemixError(ErrorCode.INTERNAL, f"{what} on stage {stage}: {result.error}")
