"""Two ways to average replicas: `python -m bench.exchange`.

*peers' files*: what LeMix does. Every process writes a snapshot, fetches the others' over gRPC, writes the mean and
adds mean - own to its weights. *all-reduce*: torch.distributed with gloo over the same loopback, into a copy of the
weights. Each process is a replica with one thread. Measured are rounds, and what the others see when a member ends, or
stops without ending, once a round has begun. Writes `out/bench/exchange.json`.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bench.report.summary import run_facts, write_summary
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from services.node_agent.combine import Replica, write_mean
from services.node_agent.peer_weights import chunks, fetch_replica
from services.node_agent.tensor_file import TensorFile

#: Tensors a model of so many parameters is cut into, about as many as a Llama has per layer and ten layers.
_TENSORS = 70
#: Longest a member waits for the others, seconds, in a round and in one with a member that fails. The scheduler's
#: `sync_timeout_s` is 30.
_ROUND_S, TIMEOUT_S = 120.0, 10.0
_JOIN_S = 180.0
_ANSWER_S = 600.0


class Member:
    """One replica in its process: rank, number of members, weights by name."""

    def __init__(self, rank: int, world: int, parameters: int, folder: Path) -> None:
        torch.set_num_threads(1)
        self.rank, self.world, self.folder = rank, world, folder
        size = parameters // _TENSORS
        generator = torch.Generator().manual_seed(rank)
        self.weights = {f"w{index}": torch.randn(size, generator=generator) for index in range(_TENSORS)}


class PeerFiles:
    """Averages as the node agent does it."""

    name = "peers' files"

    def __init__(self, member: Member) -> None:
        self._member = member
        self._snapshot: Replica | None = None

    def address(self, rank: int) -> str:
        """host:port of a member that has joined."""
        return (self._member.folder / f"address-{rank}").read_text(encoding="utf-8")

    async def fetch_weights(self, request: Any, context: Any) -> AsyncIterator[node_pb2.FetchWeightsResponse]:
        """FetchWeights of the contract."""
        assert self._snapshot is not None
        for chunk in chunks(self._snapshot, None):
            yield chunk

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Serve snapshots meanwhile."""
        server = grpc.aio.server()
        fetch = grpc.unary_stream_rpc_method_handler(
            self.fetch_weights,
            request_deserializer=node_pb2.FetchWeightsRequest.FromString,
            response_serializer=node_pb2.FetchWeightsResponse.SerializeToString,
        )
        service = node_pb2.DESCRIPTOR.services_by_name["NodeAgentService"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"FetchWeights": fetch}),))
        port = server.add_insecure_port("127.0.0.1:0")
        (self._member.folder / f"address-{self._member.rank}").write_text(f"127.0.0.1:{port}", encoding="utf-8")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    def take_snapshot(self) -> None:
        """Phase one."""
        path = self._member.folder / f"snapshot-{self._member.rank}"
        save_file(self._member.weights, path)
        self._snapshot = Replica(self.address(self._member.rank), [TensorFile.open(path)])

    async def average(self, ranks: list[int], timeout_s: float) -> None:
        """Phase two, with the snapshots of `ranks`."""
        member = self._member
        peers = [rank for rank in ranks if rank != member.rank]
        async with asyncio.timeout(timeout_s):
            paths = [member.folder / f"peer-{member.rank}-{rank}" for rank in peers]
            pairs = zip(peers, paths, strict=True)
            fetched = await asyncio.gather(*(fetch_replica(self.address(rank), "s", path) for rank, path in pairs))
        mean, own = member.folder / f"mean-{member.rank}", member.folder / f"snapshot-{member.rank}"
        assert self._snapshot is not None
        await asyncio.to_thread(write_mean, mean, [self._snapshot, *(peer.replica for peer in fetched)])
        for peer in fetched:
            peer.close()
        for name, loaded in load_file(mean).items():
            member.weights[name] += loaded - load_tensor(own, name)


def load_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(name)
    return tensor


@contextmanager
def process_group(member: Member, world: int, name: str, timeout_s: float) -> Iterator[None]:
    """A gloo group that rendezvous through a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{member.folder}/{name}",
        rank=member.rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce(member: Member, world: int) -> None:
    """One round over everything at once."""
    own = torch.cat([tensor.flatten() for tensor in member.weights.values()])
    mean = own.clone()
    dist.all_reduce(mean)
    mean.div_(world).sub_(own)
    offset = 0
    for tensor in member.weights.values():
        tensor += mean[offset : offset + tensor.numel()].view_as(tensor)
        offset += tensor.numel()


# ------------------------------------------------------------------------- members


def run_files(member: Member, wait: Callable[[], None], repeat: int) -> list[dict[str, float]]:
    """Rounds of peers' files."""

    async def go() -> list[dict[str, float]]:
        way = PeerFiles(member)
        async with way.joined():
            found = []
            for _ in range(repeat):
                await asyncio.to_thread(wait)
                began_s, cpu_s = time.monotonic(), time.process_time()
                way.take_snapshot()
                await asyncio.to_thread(wait)  # the scheduler's: phase two begins when all snapshots exist
                await way.average(list(range(member.world)), _ROUND_S)
                found.append({"wall_s": time.monotonic() - began_s, "cpu_s": time.process_time() - cpu_s})
            await asyncio.to_thread(wait)  # nobody leaves while others fetch
            return found

    return asyncio.run(go())


def run_all_reduce(member: Member, wait: Callable[[], None], repeat: int) -> list[dict[str, float]]:
    """Rounds of all-reduce in one group."""
    found = []
    with process_group(member, member.world, "group", _ROUND_S):
        for _ in range(repeat):
            wait()
            began_s, cpu_s = time.monotonic(), time.process_time()
            all_reduce(member, member.world)
            found.append({"wall_s": time.monotonic() - began_s, "cpu_s": time.process_time() - cpu_s})
        wait()
    return found


def lose_files(member: Member, wait: Callable[[], None], how: str) -> dict[str, float]:
    """The last member fails after its snapshot was announced: time to the error, and to the end of the next round."""

    async def go() -> dict[str, float]:
        way = PeerFiles(member)
        async with way.joined():
            way.take_snapshot()
            await asyncio.to_thread(wait)
            if member.rank == member.world - 1:
                fail(how)
            began_s = time.monotonic()
            try:
                await way.average(list(range(member.world)), TIMEOUT_S)
            except Exception:  # whatever it is, the round failed
                noticed_s = time.monotonic() - began_s
            else:
                raise AssertionError("a round with a lost member must fail")
            way.take_snapshot()
            await way.average(list(range(member.world - 1)), TIMEOUT_S)
            again_s = time.monotonic() - began_s
            await asyncio.sleep(2.0)  # peers may still fetch
            return {"noticed_s": noticed_s, "again_s": again_s}

    return asyncio.run(go())


def lose_all_reduce(member: Member, wait: Callable[[], None], how: str) -> dict[str, float]:
    """As `lose_files`, with a new group of the survivors."""
    found = {}
    with process_group(member, member.world, "group", TIMEOUT_S):
        all_reduce(member, member.world)
        wait()
        if member.rank == member.world - 1:
            fail(how)
        began_s = time.monotonic()
        try:
            all_reduce(member, member.world)
        except RuntimeError:
            found["noticed_s"] = time.monotonic() - began_s
        else:
            raise AssertionError("a round with a lost member must fail")
    with process_group(member, member.world - 1, "survivors", TIMEOUT_S):
        all_reduce(member, member.world - 1)
        found["again_s"] = time.monotonic() - began_s
    return found


def fail(how: str) -> None:
    """End at once, or stop without ending (a hung process, a cut cable)."""
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


# ------------------------------------------------------------------------- measurement

_ROUNDS = {"peers' files": run_files, "all-reduce": run_all_reduce}
_LOSSES = {"peers' files": lose_files, "all-reduce": lose_all_reduce}


def _member(
    rank: int, world: int, parameters: int, folder: str, barrier: Any, answers: Any, way: str, what: int | str
) -> None:
    member = Member(rank, world, parameters, Path(folder))

    def wait() -> None:
        barrier.wait(_JOIN_S)

    found = _ROUNDS[way](member, wait, what) if isinstance(what, int) else _LOSSES[way](member, wait, what)
    answers.put((rank, found))


def play(way: str, world: int, parameters: int, what: int | str) -> list[Any]:
    """Answers of the members that are left, by rank. what: repetitions, or how the last member fails."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(world), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        members = [
            context.Process(target=_member, args=(rank, world, parameters, folder, barrier, answers, way, what))
            for rank in range(world)
        ]
        for member in members:
            member.start()
        try:
            left = world if isinstance(what, int) else world - 1
            found = dict(answers.get(timeout=_ANSWER_S) for _ in range(left))
        finally:
            for member in members:
                member.kill()
                member.join()
    return [found[rank] for rank in sorted(found)]


def measure_rounds(parameters: int, world: int, repeat: int) -> list[dict[str, Any]]:
    """Both ways: time of a round until its last member has it, CPU time of all members; medians."""
    rows = []
    for way in _ROUNDS:
        members = play(way, world, parameters, repeat + 1)
        rounds = list(zip(*members, strict=True))[1:]  # the first one opens connections
        rows.append(
            {
                "way": way,
                "parameters": parameters,
                "members": world,
                "wall_s": statistics.median(max(item["wall_s"] for item in items) for items in rounds),
                "cpu_s": statistics.median(sum(item["cpu_s"] for item in items) for items in rounds),
            }
        )
    return rows


def measure_losses(parameters: int) -> list[dict[str, Any]]:
    """Both ways with three members, of which one fails: the slowest survivor's times."""
    rows = []
    for how in ("killed", "stopped"):
        for way in _LOSSES:
            found = play(way, 3, parameters, how)
            rows.append({"way": way, "how": how, **{key: max(item[key] for item in found) for key in found[0]}})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description="Two ways to average replicas.")
    parser.add_argument("--repeat", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--parameters", default="14,100", help="sizes of the model, millions (default 14,100)")
    parser.add_argument("--members", default="2,4", help="numbers of replicas (default 2,4)")
    parser.add_argument("--out", type=Path, default=Path("out/bench/exchange.json"))
    args = parser.parse_args()
    sizes = [int(1e6 * float(value)) for value in args.parameters.split(",")]
    worlds = [int(value) for value in args.members.split(",")]
    facts = run_facts()
    rounds: list[dict[str, Any]] = []
    print(f"{'parameters':>10}{'members':>9}  {'way':<14}{'round s':>9}{'CPU s':>8}")
    for size, world in itertools.product(sizes, worlds):
        rounds += measure_rounds(size, world, args.repeat)
        for row in rounds[-len(_ROUNDS) :]:
            counts = f"{row['parameters'] / 1e6:>8.0f} M{row['members']:>9}"
            print(f"{counts}  {row['way']:<14}{row['wall_s']:>9.3f}{row['cpu_s']:>8.2f}", flush=True)
    losses = measure_losses(sizes[0])
    print(f"{'a member is':<14}{'way':<14}{'noticed s':>10}{'next round s':>14}")
    for row in losses:
        print(f"{row['how']:<14}{row['way']:<14}{row['noticed_s']:>10.2f}{row['again_s']:>14.2f}")
    summary = {
        **facts,
        "config": {"repeat": args.repeat, "timeout_s": TIMEOUT_S},
        "rounds": rounds,
        "losses": losses,
    }
    write_summary(args.out, summary)


if __name__ == "__main__":
    main()
