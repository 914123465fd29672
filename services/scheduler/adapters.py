"""Isolated adapters of the nodes, as the scheduler knows them: listed as models, and freed when nobody wants them."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import cluster_service_pb2, types_pb2

_log = structlog.get_logger()

#: Rounds of synchronisation remembered; one runs at a time.
_KEPT_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class _Round:
    """`held`: adapters by the nodes that held them. skip_weights: no node's weights differ from the model directory."""

    held: Mapping[str, Mapping[str, pb.HeldAdapter]]
    skip_weights: bool


async def _nobody(job_id: str) -> types_pb2.TrainingJob | None:
    del job_id
    return None


class AdapterDesk:
    """`send` reaches a connected node; `find_job` a job, None: there is none (any more). Set both before use."""

    def __init__(self) -> None:
        self.send: Callable[[str, pb.NodeSessionResponse], bool] = lambda node_id, message: False
        self.find_job: Callable[[str], Awaitable[types_pb2.TrainingJob | None]] = _nobody
        #: Model and adapters of every connected node.
        self._models: dict[str, str] = {}
        self._held: dict[str, tuple[str, ...]] = {}
        #: Everything that connected nodes hold, by id; whether their weights are not the model directory's any more.
        self._all: dict[str, dict[str, pb.HeldAdapter]] = {}
        self._weights_changed: dict[str, bool] = {}
        #: What the newest rounds of synchronisation are about.
        self._rounds: dict[str, _Round] = {}
        #: Adapters that are wanted, with the time their job was made.
        self._wanted: dict[str, float] = {}
        #: How many were freed, to notice that one was while its job was looked up.
        self._num_freed = 0

    # ------------------------------------------------------------- told by the nodes

    def joined(self, node_id: str, model: str) -> None:
        """A node is here; what it holds it tells next."""
        self._models[node_id] = model
        self._forget(node_id)

    def left(self, node_id: str) -> None:
        """A node is gone."""
        self._models.pop(node_id, None)
        self._forget(node_id)
        held = {adapter_id for held in self._held.values() for adapter_id in held}
        self._wanted = {adapter_id: made for adapter_id, made in self._wanted.items() if adapter_id in held}

    def _forget(self, node_id: str) -> None:
        for of_nodes in (self._held, self._all, self._weights_changed):
            of_nodes.pop(node_id, None)

    async def told(
        self, node_id: str, adapters: Iterable[pb.HeldAdapter], *, weights_changed: bool = False
    ) -> tuple[str, ...] | None:
        """A node tells which adapters it holds, and whether the weights below were changed; returns the isolated ones
        that serve, None when they are the same as when it told last."""
        isolated = sorted(adapter.adapter_id for adapter in adapters if adapter.isolated)
        serving = tuple([adapter_id for adapter_id in isolated if await self._is_wanted(adapter_id)])
        if node_id not in self._models:
            return None  # it left meanwhile
        self._weights_changed[node_id] = weights_changed
        unwanted = set(isolated).difference(serving)
        for adapter_id in unwanted:
            self._tell(node_id, adapter_id)
        known = {adapter.adapter_id: adapter for adapter in adapters if adapter.adapter_id not in unwanted}
        self._all[node_id] = dict(sorted(known.items()))
        if self._held.get(node_id) == serving:
            return None
        self._held[node_id] = serving
        return serving

    async def _is_wanted(self, adapter_id: str) -> bool:
        if adapter_id in self._wanted:
            return True
        num_freed = self._num_freed
        try:
            job = await self.find_job(adapter_id)
        except LemixError as error:
            # Asked again with the next heartbeat.
            _log.warning("cannot look an adapter's job up", adapter=adapter_id, error=str(error))
            return True
        if job is not None and not job.served_model:
            return False
        # One whose job is not on record any more stays until it is deleted. What a deletion may have overtaken is asked
        # again.
        if num_freed == self._num_freed:
            self._wanted[adapter_id] = 0.0 if job is None else job.created_unix_s
        return True

    # ------------------------------------------------------------- synchronisation

    def snapshot(self, sync_id: str, node_id: str) -> pb.TakeSnapshot:
        """What a source of a round copies. The round is about what nodes hold when its first source is told."""
        if sync_id not in self._rounds:
            held = {name: dict(adapters) for name, adapters in self._all.items()}
            skip_weights = any(held.values()) and not any(self._weights_changed.values())
            self._rounds[sync_id] = _Round(held, skip_weights)
        while len(self._rounds) > _KEPT_ROUNDS:
            del self._rounds[next(iter(self._rounds))]
        about = self._rounds[sync_id]
        adapters = about.held.get(node_id, {}).values()
        return pb.TakeSnapshot(sync_id=sync_id, skip_weights=about.skip_weights, adapters=adapters)

    def apply(self, message: pb.ApplyWeights, node_id: str, sources: Mapping[str, str]) -> None:
        """Add to a command what becomes of the adapters. sources: addresses of the round's other sources by node.

        A node that holds an adapter takes part in its average; another one takes over a copy.
        """
        about = self._rounds.get(message.sync_id, _Round({}, False))
        held, message.skip_weights = about.held, about.skip_weights
        for adapter_id, adapter in sorted({key: item for own in held.values() for key, item in own.items()}.items()):
            addresses = [address for name, address in sorted(sources.items()) if adapter_id in held.get(name, {})]
            averages = message.mode == pb.SYNC_MODE_AVERAGE and adapter_id in held.get(node_id, {})
            if addresses:
                message.adapters.add(
                    adapter=adapter,
                    mode=pb.SYNC_MODE_AVERAGE if averages else pb.SYNC_MODE_REPLACE,
                    source_addresses=addresses if averages else addresses[:1],
                )

    # ------------------------------------------------------------- asked

    def models(self) -> list[cluster_service_pb2.Model]:
        """Every adapter that a connected node holds."""
        found = {(self._models[node_id], adapter_id) for node_id, held in self._held.items() for adapter_id in held}
        return [
            cluster_service_pb2.Model(
                id=model_of(parent, adapter_id), parent=parent, created_unix_s=self._wanted.get(adapter_id, 0.0)
            )
            for parent, adapter_id in sorted(found)
        ]

    def free(self, adapter_id: str) -> None:
        """Nobody may use this adapter any more. Who makes it only now is told when it says so."""
        self._num_freed += 1
        self._wanted.pop(adapter_id, None)
        for node_id in self._models:
            self._tell(node_id, adapter_id)

    def free_held(self, adapter_id: str) -> bool:
        """The same if a connected node holds it; False: none does."""
        is_held = any(adapter_id in held for held in self._held.values())
        if is_held:
            self.free(adapter_id)
        return is_held

    def _tell(self, node_id: str, adapter_id: str) -> None:
        self.send(node_id, pb.NodeSessionResponse(forget_adapter=pb.ForgetAdapter(adapter_id=adapter_id)))


def model_of(parent: str, job_id: str) -> str:
    """Id under which the adapter of an isolated job is served."""
    return f"{parent}:{job_id}"
