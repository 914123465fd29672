"""The cluster as its users see it: models, nodes, readiness."""

import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.v1 import cluster_service_pb2
from services.gateway.scheduler_calls import call
from services.gateway.scheduler_link import SchedulerLink

#: A probe must be answered soon, also when the scheduler hangs.
_STATUS_TIMEOUT_S = 2.0


class ClusterView:
    """Answers about the cluster. The model list is the gateway's own; the rest is asked of the scheduler."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        link: SchedulerLink,
        model: cluster_service_pb2.Model,
        *,
        call_timeout_s: float,
    ) -> None:
        self._stub = pb_grpc.SchedulerServiceStub(channel)
        self._link = link
        self.model = model
        self._timeout_s = call_timeout_s

    async def get_model(self, model_id: str) -> cluster_service_pb2.Model:
        """Raises MODEL_NOT_FOUND."""
        if model_id == self.model.id:
            return self.model
        found = next((model for model in await self.models() if model.id == model_id), None)
        if found is None:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"model {model_id[:200]!r} is not served here", param="model")
        return found

    async def models(self) -> list[cluster_service_pb2.Model]:
        """The model itself, then the adapters of isolated jobs; without a scheduler nobody knows of any."""
        try:
            adapters = (await self._state()).adapters
        except LemixError:
            return [self.model]
        models = [self.model]
        for adapter in adapters:
            if adapter.parent == self.model.id:
                model = cluster_service_pb2.Model(id=adapter.id, parent=adapter.parent)
                model.max_context_tokens = self.model.max_context_tokens
                model.created_unix_s = adapter.created_unix_s
                models.append(model)
        return models

    async def _state(self) -> pb.GetClusterStateResponse:
        timeout_s = min(self._timeout_s, _STATUS_TIMEOUT_S)
        return await call(self._stub.GetClusterState, pb.GetClusterStateRequest(), timeout_s)

    async def status(self) -> cluster_service_pb2.GetStatusResponse:
        """Nodes, queues, policy. Never fails for an unreachable scheduler: that is a status."""
        try:
            response = await self._state()
        except LemixError as error:
            return cluster_service_pb2.GetStatusResponse(ready=False, not_ready_reason=error.message)
        status: cluster_service_pb2.GetStatusResponse = response.status
        if status.ready and not self._link.connected:
            status.ready = False
            status.not_ready_reason = "the session with the scheduler is being opened"
        return status

    async def not_ready_reason(self) -> str:
        """Empty: requests can be answered."""
        status = await self.status()
        return "" if status.ready else status.not_ready_reason or "the scheduler is not ready"
