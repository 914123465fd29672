"""gRPC handlers of the node agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from lemix.errors import LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from services.node_agent.measure import Measurer
from services.node_agent.peer_weights import chunks
from services.node_agent.tokens import TokenHub, TokenReader
from services.node_agent.weights import WeightSync
from services.runtime.interceptors import Context

FULL_NAME = "lemix.internal.v1.NodeAgentService"


class NodeAgentServicer:
    """Implements NodeAgentService."""

    def __init__(
        self,
        *,
        hub: TokenHub,
        weights: WeightSync,
        measurer: Measurer,
        node_info: Callable[[], node_pb2.GetNodeInfoResponse],
    ) -> None:
        self._hub = hub
        self._weights = weights
        self._measurer = measurer
        self._node_info = node_info

    async def StreamTokens(  # noqa: N802  the generated name
        self, requests: AsyncIterator[node_pb2.StreamTokensRequest], context: Context
    ) -> AsyncIterator[node_pb2.StreamTokensResponse]:
        """See the contract. Ends when the gateway names no more requests and has all outcomes, or the node stops."""
        del context
        reader = self._hub.open()
        attaching = asyncio.create_task(_attach(reader, requests))
        try:
            async for response in reader.responses():
                yield response
            if attaching.done():
                attaching.result()  # an attach that failed ends the stream with its error
        finally:
            self._hub.close(reader)
            attaching.cancel()
            with contextlib.suppress(asyncio.CancelledError, LemixError):
                await attaching

    async def MeasureOps(  # noqa: N802
        self, request: node_pb2.MeasureOpsRequest, context: Context
    ) -> AsyncIterator[node_pb2.MeasureOpsResponse]:
        """See the contract."""
        del context
        async with contextlib.aclosing(self._measurer.run(request)) as responses:
            async for response in responses:
                yield response

    async def FetchWeights(  # noqa: N802
        self, request: node_pb2.FetchWeightsRequest, context: Context
    ) -> AsyncIterator[node_pb2.FetchWeightsResponse]:
        """See the contract."""
        del context
        with self._weights.handed_out(request.sync_id) as snapshot:
            for chunk in chunks(snapshot.replica, snapshot.trained_unix_s):
                yield chunk

    async def GetNodeInfo(  # noqa: N802
        self, request: node_pb2.GetNodeInfoRequest, context: Context
    ) -> node_pb2.GetNodeInfoResponse:
        """See the contract."""
        del request, context
        return self._node_info()


async def _attach(reader: TokenReader, requests: AsyncIterator[node_pb2.StreamTokensRequest]) -> None:
    """Attach what the gateway names. An attach that is refused, or anything else that fails, ends the stream."""
    try:
        async for request in requests:
            reader.attach(request.request_id, request.offset)
    except BaseException:
        reader.end()
        raise
    reader.end_attaching()
