"""Seeded traffic of both kinds of cluster: who asks what and when. Pure."""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.live.requests import PlannedRequest
from services.latency import NodeLatency, OpKind
from services.simulator.arrivals import bursty
from services.simulator.lengths import LogNormal


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


_PROMPT = LogNormal.of(350.0, 250.0, shortest=16, longest=2000)
_LONG_PROMPT = LogNormal.of(1400.0, 500.0, shortest=400, longest=3000)
_OUTPUT = LogNormal.of(40.0, 30.0, shortest=2, longest=160)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Traffic on the emulated cluster. load: mean rate as a share of what the profile says the cluster can serve.

    long_share: share of the requests whose prompts are long. cv: coefficient of variation of the gaps between
    arrivals. node: settings of the node agents besides the usual ones.
    """

    name: str
    title: str
    load: float
    long_share: float = 0.0
    cv: float = 1.0
    trains: bool = False
    node: dict[str, Any] = field(default_factory=dict)

    def draw(self, rng: random.Random) -> Lengths:
        """Lengths of one request."""
        prompt = _LONG_PROMPT if rng.random() < self.long_share else _PROMPT
        return Lengths(prompt.draw(rng), _OUTPUT.draw(rng))


EMULATED = (
    Workload(name="steady", title="Poisson arrivals", load=0.5),
    Workload(name="bursty", title="bursts: gaps that vary 2.5 times as much", load=0.4, cv=2.5),
    Workload(name="long_prompts", title="prompts of 1,400 tokens", load=0.5, long_share=1.0),
    Workload(name="training", title="an endless training backlog beside", load=0.4, trains=True),
    Workload(
        name="mixed",
        title="short and long prompts in pieces, training beside",
        load=0.4,
        long_share=0.2,
        trains=True,
        node={"max_batch_tokens": 512},
    ),
    Workload(name="overload", title="more than the cluster can serve", load=1.3),
)


def capacity_rps(latency: NodeLatency, lengths: Sequence[Lengths], *, max_batch: int) -> float:
    """Requests per second that one node can serve: one prefill each on every stage, and a share of full batches."""
    cost_s = max(
        sum(
            latency.op_s(stage, OpKind.PREFILL, 1, item.prompt)
            + (item.output - 1)
            * latency.op_s(stage, OpKind.DECODE, max_batch, item.prompt + item.output / 2)
            / max_batch
            for item in lengths
        )
        for stage in range(latency.num_stages)
    )
    return len(lengths) / cost_s


def arrivals(rng: random.Random, rate: float, seconds: float, *, cv: float = 1.0) -> list[float]:
    """Times in [0, seconds)."""
    times: list[float] = []
    for at_s in bursty(rng, rate, cv=cv):
        if at_s >= seconds:
            return times
        times.append(at_s)
    return times


def request(request_id: str, at_s: float, lengths: Lengths, rng: random.Random) -> PlannedRequest:
    """A request of random letters, one token each."""
    return PlannedRequest(request_id, at_s, letters(rng, lengths.prompt), "", lengths.output, "")


def letters(rng: random.Random, length: int) -> str:
    """So many random letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=length))
