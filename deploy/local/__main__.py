"""`make up`: a local cluster in the foreground."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.emulated_model import MODEL_NAME, emulated_node, write_emulated_model
from deploy.local.settings import LocalClusterConfig
from deploy.local.tiny_model import write_tiny_model
from services.arguments import parser_class
from services.profile_artifact import load_artifact

_WATCH_S = 0.5
_MAX_PORT = 65535
#: Id of the model that is served when none is named.
_TINY_NAME = "tiny"
_SYNC = ("none", "average", "checkpoint")
_NOISE = "(the tiny model has random weights: its text is noise; --model DIR serves a real one)"
_MADE_UP = "(the nodes are emulated: they take the time of a real one and make their text up)"


def build_parser() -> argparse.ArgumentParser:
    """Options of `make up UP_ARGS="..."`."""
    parser = parser_class("up")(prog="make up UP_ARGS=...", description="Run a LeMix cluster on this machine.")
    parser.add_argument("--model", type=Path, help="Hugging Face model directory (default: a tiny one, not trained)")
    parser.add_argument("--nodes", type=_positive, default=2, help="node agents, each with a replica (default 2)")
    parser.add_argument("--stages", type=_positive, help="pipeline stages per node (default 1, or the profile's)")
    parser.add_argument(
        "--emulate", type=Path, metavar="PROFILE", help="nodes that take the time of this profile and compute nothing"
    )
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="emulated operations take so many times as long (default 1)"
    )
    parser.add_argument("--policy", default="lemix", help="scheduling policy (default lemix)")
    parser.add_argument("--sync", choices=_SYNC, help="how replicas are kept together (default: as the policy does it)")
    parser.add_argument("--sync-every", type=int, metavar="K", help="optimizer steps of a node between; -1: by the job")
    parser.add_argument("--port", type=_port, default=8000, help="port of the REST API; 0: a free one (default 8000)")
    parser.add_argument(
        "--grpc-port", type=_port, default=50051, help="port of the gRPC API; 0: a free one (default 50051)"
    )
    parser.add_argument("--directory", type=Path, default=Path("out/up"), help="logs, profiles, data (default out/up)")
    parser.add_argument("--redis-url", help="Redis to use instead of starting one")
    parser.add_argument("--nice", type=int, default=10, help="niceness of the stage workers (default 10)")
    parser.add_argument("--no-pin", action="store_true", help="do not give each stage a core of its own")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run until Ctrl-C. Exit code 0: stopped; 1: could not start, or a service died."""
    options = build_parser().parse_args(arguments)
    try:
        emulated = _emulated(options)
        model = _model(options)
    except OSError as error:
        print(f"up: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"up: {error}", file=sys.stderr)
        return 1
    config = LocalClusterConfig(
        model_path=model.path,
        directory=options.directory,
        num_nodes=options.nodes,
        num_stages=emulated.num_stages if emulated else options.stages or 1,
        node=emulated.node if emulated else {},
        policy=options.policy,
        model_name=model.name,
        core=sync_settings(options),
        http_port=options.port,
        grpc_port=options.grpc_port,
        redis_url=options.redis_url,
        nice=options.nice,
        pin_cpus=not (options.no_pin or emulated),
    )
    try:
        asyncio.run(_run(LocalCluster(config)))
    except ClusterError as error:
        print(f"\nThe cluster stopped: {error}", file=sys.stderr)
        return 1
    return 0


class _Model(NamedTuple):
    """Where it lies, and the id it is served under; empty: the directory's name."""

    path: Path
    name: str


class _Emulated(NamedTuple):
    num_stages: int
    node: dict[str, Any]


def _model(options: argparse.Namespace) -> _Model:
    """The model directory that is named, or one that is written. Raises OSError, ValueError."""
    if options.model is not None:
        return _Model(options.model, "")
    path = options.directory / ("model" if options.emulate is None else "emulated-model")
    is_there = (path / "config.json").is_file()
    if options.emulate is not None:
        if not is_there:
            print(f"Writing the shape of Llama-2-7B to {path} ...", flush=True)
            write_emulated_model(path)
        return _Model(path, MODEL_NAME)
    if not is_there:
        print(f"Writing a tiny model with random weights to {path} ...", flush=True)
        write_tiny_model(path)
    return _Model(path, _TINY_NAME)


def _emulated(options: argparse.Namespace) -> _Emulated | None:
    """Settings of emulated nodes, if they are asked for. Raises ValueError for a profile that does not fit."""
    if options.emulate is None:
        return None
    if options.time_scale <= 0.0:
        raise ValueError(f"--time-scale must be positive, not {options.time_scale:g}")
    profile = load_artifact(options.emulate)
    if options.stages not in (None, profile.num_stages):
        raise ValueError(f"{options.emulate} is of {profile.num_stages} stages, --stages is {options.stages}")
    return _Emulated(profile.num_stages, emulated_node(options.emulate, options.time_scale))


def sync_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the scheduler's core for --sync and --sync-every; the scheduler checks them."""
    given = {"sync": options.sync, "sync_every_steps": options.sync_every}
    return {name: value for name, value in given.items() if value is not None}


async def _run(cluster: LocalCluster) -> None:
    """Start, watch, stop. Raises ClusterError; returns after a signal."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    config = cluster.config
    print(f"Starting Redis, profiler, scheduler, {config.num_nodes} node agent(s), gateway ...", flush=True)
    starting = asyncio.create_task(cluster.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        print("\nStopped before the cluster was ready.", flush=True)
        return
    try:
        await starting
        print(_ready_text(cluster), flush=True)
        while not stop.is_set():
            cluster.check()
            await asyncio.wait({stopping}, timeout=_WATCH_S)
        print("\nStopping ...", flush=True)
    finally:
        stopping.cancel()
        await cluster.stop()
    print("Stopped.", flush=True)


def _ready_text(cluster: LocalCluster) -> str:
    config = cluster.config
    model = config.model_name or config.model_path.resolve().name
    cores = "each stage on a core of its own" if cluster.pinned else "stages not pinned to cores"
    chat = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    completion = json.dumps({"model": model, "prompt": "The import statement", "max_tokens": 32})
    feedback = json.dumps({"prompt": "The capital of France is", "completion": " Paris."})
    remark = {_TINY_NAME: _NOISE, MODEL_NAME: _MADE_UP}.get(config.model_name, "")
    noise = f"\n  {remark}" if remark else ""
    return f"""
LeMix is ready: {config.num_nodes} node(s) x {config.num_stages} stage(s), policy {config.policy}, {cores}

  REST   {cluster.url}   (OpenAI clients: base_url {cluster.url}/v1, any API key)
  gRPC   {cluster.grpc_address}
  model  {model}

Generate:{noise}
  curl {cluster.url}/v1/completions -H 'Content-Type: application/json' \\
    -d '{completion}'
  curl {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{chat}'
Teach it something while it serves:
  curl {cluster.url}/v1/feedback -H 'Content-Type: application/json' \\
    -d '{feedback}'

Profiles: .venv/bin/python -m services.profiler.profiles --address {cluster.profiler_address} list
Logs, with the address that each service listens at, and settings: {config.directory}/logs, {config.directory}/config
Ctrl-C stops everything."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to {_MAX_PORT}, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
