"""Sends this node's snapshots to peers, and fetches theirs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import grpc
import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from services.node_agent.combine import Replica
from services.node_agent.tensor_file import TensorFile, TensorInfo
from services.runtime.grpc_client import open_channel

if TYPE_CHECKING:
    from lemix.internal.v1.node_agent_service_pb2_grpc import NodeAgentServiceAsyncStub

_CHUNK_BYTES = 1 << 20


def chunks(replica: Replica, trained_unix_s: float | None) -> Iterator[node_pb2.FetchWeightsResponse]:
    """A replica in messages of at most 1 MiB of data; a tensor without elements is one empty message."""
    for name, info in replica.tensors.items():
        for offset in range(0, max(1, info.num_bytes), _CHUNK_BYTES):
            yield node_pb2.FetchWeightsResponse(
                name=name,
                shape=info.shape,
                dtype=info.dtype,
                data=replica.read(name, offset, _CHUNK_BYTES),
                offset_bytes=offset,
                trained_unix_s=trained_unix_s,
            )


class FetchedReplica:
    """A peer's weights in a file of their own. `close` unmaps and removes it."""

    def __init__(self, replica: Replica, file: TensorFile, path: Path, trained_unix_s: float | None) -> None:
        self.replica = replica
        self.trained_unix_s = trained_unix_s
        self._file = file
        self._path = path

    def close(self) -> None:
        """Unmap and remove the file."""
        self._file.close()
        _remove(self._path)


async def fetch_replica(address: str, sync_id: str, path: Path) -> FetchedReplica:
    """Fetch a peer's snapshot into a file. The caller sets the deadline.

    Raises LemixError: what the peer answered, UNAVAILABLE when it is away, INTERNAL for chunks that do not fit.
    """
    try:
        async with open_channel(address) as channel:
            stub: NodeAgentServiceAsyncStub = node_grpc.NodeAgentServiceStub(channel)
            call = stub.FetchWeights(node_pb2.FetchWeightsRequest(sync_id=sync_id))
            with path.open("wb") as file:
                writer = _ChunkWriter(address, file)
                async for chunk in call:
                    await asyncio.to_thread(writer.add, chunk)
        tensors = writer.finish()
        mapped = TensorFile(path, tensors)
    except BaseException as error:
        _remove(path)
        if isinstance(error, grpc.aio.AioRpcError):
            raise LemixError.from_rpc(error) from error
        raise
    return FetchedReplica(Replica(address, [mapped]), mapped, path, writer.trained_unix_s)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _ChunkWriter:
    """Writes chunks one after the other and checks that they form whole tensors."""

    def __init__(self, address: str, file: BinaryIO) -> None:
        self.trained_unix_s: float | None = None
        self._address = address
        self._file = file
        self._tensors: dict[str, TensorInfo] = {}
        self._current = ""
        self._missing_bytes = 0
        self._end = 0

    def add(self, chunk: node_pb2.FetchWeightsResponse) -> None:
        """Append a chunk. Raises LemixError INTERNAL when it is not the next one."""
        if not self._missing_bytes and chunk.name != self._current:
            self._begin(chunk)
        info = self._tensors[self._current] if chunk.name == self._current else None
        if info is None or chunk.offset_bytes != info.num_bytes - self._missing_bytes:
            raise self._broken(f"{chunk.name} at byte {chunk.offset_bytes} is out of order")
        if len(chunk.data) > self._missing_bytes:
            raise self._broken(f"{chunk.name} is longer than its shape")
        self._file.write(chunk.data)
        self._missing_bytes -= len(chunk.data)
        self._end += len(chunk.data)

    def finish(self) -> dict[str, TensorInfo]:
        """The tensors received. Raises LemixError INTERNAL when the last one is cut off or there is none."""
        if self._missing_bytes or not self._tensors:
            raise self._broken("the stream ended early")
        return self._tensors

    def _begin(self, chunk: node_pb2.FetchWeightsResponse) -> None:
        if chunk.name in self._tensors:
            raise self._broken(f"{chunk.name} came twice")
        info = TensorInfo(chunk.dtype, tuple(chunk.shape), self._end)
        try:
            self._missing_bytes = info.num_bytes
        except ValueError as error:
            raise self._broken(f"{chunk.name}: {error}") from error
        self._tensors[chunk.name] = info
        self._current = chunk.name
        if chunk.HasField("trained_unix_s"):
            self.trained_unix_s = chunk.trained_unix_s

    def _broken(self, what: str) -> LemixError:
        return LemixError(ErrorCode.INTERNAL, f"unusable weights from {self._address}: {what}")
