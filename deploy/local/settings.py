"""What the local cluster is, and the settings of each of its services: pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalClusterConfig:
    """A cluster on this machine. Mappings override single settings of a service, by their names there."""

    #: Hugging Face model directory.
    model_path: Path
    #: Run directory: `logs/`, `config/`, `redis/` and, unless told otherwise, `profiles/`.
    directory: Path
    num_nodes: int = 2
    num_stages: int = 1
    policy: str = "lemix"
    #: Id clients use; empty: the model directory's name.
    model_name: str = ""
    #: Settings of the scheduler's core, such as `sync_every_steps`.
    core: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    node: Mapping[str, Any] = field(default_factory=dict)
    #: Settings of single nodes, by index, over those of `node`. Fewer than nodes: the others have none.
    each_node: Sequence[Mapping[str, Any]] = ()
    gateway: Mapping[str, Any] = field(default_factory=dict)
    profiler: Mapping[str, Any] = field(default_factory=dict)
    #: Port of the REST API; 0: a free one.
    http_port: int = 0
    #: Port of the gRPC API; 0: a free one.
    grpc_port: int = 0
    #: Redis to use; None: LEMIX_REDIS_URL, else one started for the cluster.
    redis_url: str | None = None
    #: Added to the niceness of the stage workers, so that they never starve the control plane.
    nice: int = 10
    #: Give each stage worker a core of its own, if there are as many cores as stages.
    pin_cpus: bool = True
    profiles_directory: Path | None = None
    #: Where the scheduler logs the events of its core; None: nowhere.
    event_log: Path | None = None
    #: Longest time until every node is ready (the first start measures the nodes), seconds.
    start_timeout_s: float = 180.0
    #: Longest time a service may take to stop before it is killed, seconds.
    stop_timeout_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """host:port of everything that others must know before it listens."""

    redis_url: str
    scheduler: str
    profiler: str
    http: str
    grpc: str


@dataclass(frozen=True, slots=True)
class Service:
    """A process to start: its name in the cluster, its module under `services`, its settings."""

    name: str
    module: str
    settings: dict[str, Any]


def services_of(config: LocalClusterConfig, addresses: Addresses, cores: Sequence[int]) -> list[Service]:
    """Every service in the order of dependence. `cores`: the CPU cores this process may use."""
    return [
        Service("profiler", "profiler", _profiler(config, addresses)),
        Service("scheduler", "scheduler", _scheduler(config, addresses)),
        *(
            Service(f"node-{index}", "node_agent", _node(config, addresses, index, cores))
            for index in range(config.num_nodes)
        ),
        Service("gateway", "gateway", _gateway(config, addresses)),
    ]


def stage_cores(config: LocalClusterConfig, cores: Sequence[int]) -> list[tuple[int, ...]]:
    """Cores of each node's stages; empty tuples (not pinned) when two stages would have to share a core."""
    if not config.pin_cpus or len(cores) < config.num_nodes * config.num_stages:
        return [()] * config.num_nodes
    size = config.num_stages
    return [tuple(cores[index * size : (index + 1) * size]) for index in range(config.num_nodes)]


def _profiler(config: LocalClusterConfig, addresses: Addresses) -> dict[str, Any]:
    directory = config.profiles_directory or config.directory / "profiles"
    return {"listen": addresses.profiler, "directory": str(directory.resolve()), **config.profiler}


def _scheduler(config: LocalClusterConfig, addresses: Addresses) -> dict[str, Any]:
    return {
        "listen": addresses.scheduler,
        "redis_url": addresses.redis_url,
        "profiler_address": addresses.profiler,
        "event_log_path": str(config.event_log.resolve()) if config.event_log is not None else "",
        **config.scheduler,
        "core": {"policy": config.policy, **config.core},
    }


def _node(config: LocalClusterConfig, addresses: Addresses, index: int, cores: Sequence[int]) -> dict[str, Any]:
    return {
        "listen": "127.0.0.1:0",
        "node_id": f"node-{index}",
        "redis_url": addresses.redis_url,
        "scheduler_address": addresses.scheduler,
        "model_path": str(config.model_path.resolve()),
        "model_name": config.model_name,
        "num_stages": config.num_stages,
        "nice": config.nice,
        "cpus": list(stage_cores(config, cores)[index]),
        **config.node,
        **(config.each_node[index] if index < len(config.each_node) else {}),
    }


def _gateway(config: LocalClusterConfig, addresses: Addresses) -> dict[str, Any]:
    return {
        "listen": addresses.grpc,
        "http_listen": addresses.http,
        "scheduler_address": addresses.scheduler,
        "model_path": str(config.model_path.resolve()),
        "model_name": config.model_name,
        **config.gateway,
    }
