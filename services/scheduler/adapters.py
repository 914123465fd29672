"""Isolated adapters of the nodes, as the scheduler knows them: listed as models, and freed when nobody wants them."""

from collections.abc import Awaitable, Callable, Iterable

import structlog

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import cluster_service_pb2, types_pb2

_log = structlog.get_logger()


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
        #: Adapters that are wanted, with the time their job was made.
        self._wanted: dict[str, float] = {}

    # ------------------------------------------------------------- told by the nodes

    def joined(self, node_id: str, model: str) -> None:
        """A node is here; what it holds it tells next."""
        self._models[node_id] = model
        self._held.pop(node_id, None)

    def left(self, node_id: str) -> None:
        """A node is gone."""
        self._models.pop(node_id, None)
        self._held.pop(node_id, None)
        held = {adapter_id for held in self._held.values() for adapter_id in held}
        self._wanted = {adapter_id: made for adapter_id, made in self._wanted.items() if adapter_id in held}

    async def told(self, node_id: str, adapters: Iterable[pb.HeldAdapter]) -> tuple[str, ...] | None:
        """A node tells which adapters it holds; returns the isolated ones that serve, None when they are the same as
        before."""
        isolated = sorted(adapter.adapter_id for adapter in adapters if adapter.isolated)
        serving = tuple([adapter_id for adapter_id in isolated if await self._is_wanted(adapter_id)])
        for adapter_id in set(isolated).difference(serving):
            self._tell(node_id, adapter_id)
        if self._held.get(node_id, ()) == serving:
            return None
        self._held[node_id] = serving
        return serving

    async def _is_wanted(self, adapter_id: str) -> bool:
        if adapter_id in self._wanted:
            return True
        try:
            job = await self.find_job(adapter_id)
        except LemixError as error:
            # Asked again with the next heartbeat.
            _log.warning("cannot look an adapter's job up", adapter=adapter_id, error=str(error))
            return True
        if job is not None and not job.served_model:
            return False
        # One whose job is no longer on record stays until it is deleted.
        self._wanted[adapter_id] = 0.0 if job is None else job.created_unix_s
        return True

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
        self._wanted.pop(adapter_id, None)
        for node_id in self._models:
            self._tell(node_id, adapter_id)

    def _tell(self, node_id: str, adapter_id: str) -> None:
        self.send(node_id, pb.NodeSessionResponse(forget_adapter=pb.ForgetAdapter(adapter_id=adapter_id)))


def model_of(parent: str, job_id: str) -> str:
    """Id under which the adapter of an isolated job is served."""
    return f"{parent}:{job_id}"
