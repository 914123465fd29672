"""The local cluster: starts every service as a child process, waits until they serve, stops them all."""

import asyncio
import os
import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc.aio
import httpx
import psutil
import yaml

from deploy.local.directory_lock import DirectoryInUseError, DirectoryLock
from deploy.local.ports import is_free, pick_free
from deploy.local.process import ROOT, ChildProcess
from deploy.local.redis_server import LocalRedis, RedisServerError, redis_for_cluster
from deploy.local.settings import Addresses, LocalClusterConfig, Service, services_of, stage_cores
from lemix.v1 import cluster_service_pb2 as cluster_pb2
from lemix.v1 import cluster_service_pb2_grpc as cluster_grpc

if TYPE_CHECKING:
    from lemix.v1.cluster_service_pb2_grpc import ClusterServiceAsyncStub

_POLL_S = 0.1
_CALL_TIMEOUT_S = 2.0
#: Lines of a dead service's log that go into the error.
_TAIL_LINES = 15


class ClusterError(RuntimeError):
    """The cluster cannot start or has lost a service; the message tells which and holds the end of its log."""


class LocalCluster:
    """Redis, profiler, scheduler, node agents and gateway on this machine.

    Not bound to an event loop. However its process ends, the services end with it.
    """

    def __init__(self, config: LocalClusterConfig) -> None:
        self.config = config
        #: The server started for this cluster; None before the start and when another one is used.
        self.redis: LocalRedis | None = None
        self._children: dict[str, ChildProcess] = {}
        self._addresses: Addresses | None = None
        self._lock: DirectoryLock | None = None

    # ------------------------------------------------------------- life

    async def start(self) -> None:
        """Start everything and return when every node is ready and the gateway serves.

        Raises ClusterError (with the log of the service at fault) after stopping whatever was started.
        """
        try:
            # In this thread, though it blocks for some 30 ms: Linux counts the end of the thread that started a process
            # as the death of its parent.
            self._prepare()
            for child in self._children.values():
                child.start()
            await self._await_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop every service, the gateway first; bounded, then killed. Idempotent."""
        gateway = [child for name, child in self._children.items() if name == "gateway"]
        nodes = [child for name, child in self._children.items() if name.startswith("node-")]
        others = [child for child in self._children.values() if child not in gateway and child not in nodes]
        for group in (gateway, nodes, others):
            await asyncio.gather(*(child.stop(self.config.stop_timeout_s) for child in group))
        self._children.clear()
        if self.redis is not None:
            await asyncio.to_thread(self.redis.stop)
            self.redis = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _prepare(self) -> None:
        config = self.config
        if not (config.model_path / "config.json").is_file():
            raise ClusterError(f"{config.model_path} is not a model directory: it has no config.json")
        self._lock = self._take_directory()
        ports = self._choose_ports()
        redis_url = self._start_redis()
        self._addresses = Addresses(
            redis_url=redis_url,
            scheduler=f"127.0.0.1:{ports[0]}",
            profiler=f"127.0.0.1:{ports[1]}",
            http=f"127.0.0.1:{ports[2]}",
            grpc=f"127.0.0.1:{ports[3]}",
        )
        shutil.rmtree(config.directory / "logs", ignore_errors=True)
        (config.directory / "config").mkdir(parents=True, exist_ok=True)
        environment = _child_environment(os.environ)
        for service in services_of(config, self._addresses, available_cores()):
            self._children[service.name] = self._child(service, environment)

    def _take_directory(self) -> DirectoryLock:
        directory = self.config.directory
        try:
            return DirectoryLock(directory)
        except DirectoryInUseError as error:
            raise ClusterError(
                f"{directory} is used by another cluster; stop that one, or give this one another --directory, --port "
                "and --grpc-port"
            ) from error
        except OSError as error:
            raise ClusterError(f"cannot write to {directory}: {error.strerror}") from error

    def _choose_ports(self) -> list[int]:
        config = self.config
        for port, option in ((config.http_port, "--port"), (config.grpc_port, "--grpc-port")):
            if port and not is_free(port):
                raise ClusterError(f"port {port} is in use; choose another one with {option}")
        free = pick_free(4)
        return [free[0], free[1], config.http_port or free[2], config.grpc_port or free[3]]

    def _start_redis(self) -> str:
        environment = dict(os.environ)
        if self.config.redis_url is not None:
            environment["LEMIX_REDIS_URL"] = self.config.redis_url
        try:
            url, self.redis = redis_for_cluster(environment, self.config.directory.resolve() / "redis")
        except RedisServerError as error:
            raise ClusterError(str(error)) from error
        return url

    def _child(self, service: Service, environment: Mapping[str, str]) -> ChildProcess:
        path = self.config.directory.resolve() / "config" / f"{service.name}.yaml"
        path.write_text(yaml.safe_dump(service.settings, sort_keys=False), encoding="utf-8")
        log = self.config.directory.resolve() / "logs" / f"{service.name}.log"
        return ChildProcess(service.name, f"services.{service.module}", ["--config", str(path)], log, environment)

    # ------------------------------------------------------------- readiness

    async def _await_ready(self) -> None:
        deadline_s = time.monotonic() + self.config.start_timeout_s
        reason = ""
        async with httpx.AsyncClient(trust_env=False) as http, grpc.aio.insecure_channel(self.grpc_address) as channel:
            stub: ClusterServiceAsyncStub = cluster_grpc.ClusterServiceStub(channel)
            while time.monotonic() < deadline_s:
                self.check()
                reason = await self._not_ready_reason(http, stub)
                if not reason:
                    return
                await asyncio.sleep(_POLL_S)
        tails = "\n".join(f"--- {name}\n{child.tail(3)}" for name, child in self._children.items())
        raise ClusterError(f"not ready after {self.config.start_timeout_s:g} s: {reason}\n{tails}")

    async def _not_ready_reason(self, http: httpx.AsyncClient, stub: "ClusterServiceAsyncStub") -> str:
        try:
            response = await http.get(f"{self.url}/readyz", timeout=_CALL_TIMEOUT_S)
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT_S)
        except httpx.TransportError:
            return "the gateway does not answer"
        except grpc.aio.AioRpcError as error:
            return f"the gateway does not know the cluster's state: {error.details()}"
        missing = self.config.num_nodes - sum(node.ready for node in status.nodes)
        if missing:
            return f"{missing} of {self.config.num_nodes} nodes are not ready"
        return "" if response.status_code == 200 else status.not_ready_reason or "the gateway is not ready"

    def check(self) -> None:
        """Raises ClusterError when a service has ended by itself."""
        for name, child in self._children.items():
            if child.exit_code is not None:
                tail = child.tail(_TAIL_LINES)
                raise ClusterError(
                    f"{name} ended with exit code {child.exit_code}; {child.log_path} ends with:\n{tail}"
                )

    # ------------------------------------------------------------- view and faults

    @property
    def url(self) -> str:
        """Base URL of the REST API, without a path."""
        return f"http://{self._known().http}"

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC API."""
        return self._known().grpc

    @property
    def profiler_address(self) -> str:
        """host:port of the profiler's gRPC API."""
        return self._known().profiler

    @property
    def redis_url(self) -> str:
        """URL of the ledger's Redis."""
        return self._known().redis_url

    @property
    def pinned(self) -> bool:
        """Whether every stage worker has a core of its own."""
        return all(stage_cores(self.config, available_cores()))

    def child(self, name: str) -> ChildProcess:
        """A service by its name: "profiler", "scheduler", "node-0", ..., "gateway". For faults in tests."""
        return self._children[name]

    def processes(self) -> dict[str, int]:
        """Process ids by name; a service's own children are "<service>/<n>", in the order they were started."""
        found: dict[str, int] = {}
        if self.redis is not None and self.redis.pid is not None:
            found["redis"] = self.redis.pid
        for name, child in self._children.items():
            if child.running:
                found[name] = child.pid
                family = sorted(child.descendants(), key=lambda process: process.pid)
                found.update({f"{name}/{index}": process.pid for index, process in enumerate(family)})
        return found

    def _known(self) -> Addresses:
        if self._addresses is None:
            raise RuntimeError("the cluster was not started")
        return self._addresses


def available_cores() -> list[int]:
    """CPU cores this process may use, in order; empty where the system does not tell."""
    affinity = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else []
    return sorted(affinity or [])


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The services' environment. The cluster has decided on Redis already; other LEMIX_ variables stay overrides."""
    own = {key: value for key, value in environment.items() if key != "LEMIX_REDIS_URL"}
    path = [str(ROOT), str(ROOT / "sdk"), *filter(None, [environment.get("PYTHONPATH", "")])]
    return {**own, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
