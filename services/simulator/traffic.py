"""Requests of a simulated cluster: from a trace file, or drawn from the statistics of published traces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from services.simulator.arrivals import bursty
from services.simulator.lengths import SHAPES, Shape
from services.simulator.trace_file import TraceRow

#: More is a mistake in the rate: a simulation takes about a millisecond per request.
MOST_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Workload:
    """Published traffic: lengths, requests per second (0: not published), coefficient of variation of the gaps."""

    shape: Shape
    rate: float = 0.0
    cv: float = 1.0


#: By name. Rates and gaps are measured on the Azure LLM inference traces of 2023 (CC-BY-4.0, Splitwise, ISCA'24); the
#: data sets of conversations have none, so Poisson arrivals stand in. Lengths and their sources: `lengths.py`.
WORKLOADS: Mapping[str, Workload] = {
    "azure-conv": Workload(SHAPES["conversation"], rate=5.53, cv=1.09),
    "azure-code": Workload(SHAPES["code"], rate=2.57, cv=13.15),
    "sharegpt": Workload(SHAPES["chat"]),
    "lmsys-chat": Workload(SHAPES["lmsys_chat"]),
    "hh-rlhf": Workload(SHAPES["hh_rlhf"]),
}


@dataclass(frozen=True, slots=True)
class RecordedTraffic:
    """A trace, the same for every seed; `speed` 2 has everything arrive in half the time."""

    rows: Sequence[TraceRow]
    speed: float = 1.0

    def draw(self, seed: int) -> list[TraceRow]:
        """The requests by rising arrival time."""
        del seed
        return [row._replace(arrival_s=row.arrival_s / self.speed) for row in self.rows]


@dataclass(frozen=True, slots=True)
class DrawnTraffic:
    """Random requests for `duration_s`: Gamma gaps of coefficient of variation `cv` (1: Poisson)."""

    shape: Shape
    rate: float
    duration_s: float
    cv: float = 1.0

    def draw(self, seed: int) -> list[TraceRow]:
        """The requests by rising arrival time. Raises ValueError when there are none, or more than can be simulated."""
        random = Random(f"{seed}/traffic")
        rows: list[TraceRow] = []
        for at_s in bursty(random, self.rate, cv=self.cv):
            if at_s >= self.duration_s:
                break
            if len(rows) >= MOST_REQUESTS:
                raise ValueError(
                    f"{self.rate:g} requests/s for {self.duration_s:g} s are over {MOST_REQUESTS} requests"
                )
            rows.append(TraceRow(at_s, self.shape.prompt.draw(random), self.shape.output.draw(random)))
        if not rows:
            raise ValueError(f"no request arrives within {self.duration_s:g} s at {self.rate:g} requests/s")
        return rows


@dataclass(frozen=True, slots=True)
class CutTraffic:
    """Traffic whose outputs end at a limit, as a server ends them."""

    traffic: RecordedTraffic | DrawnTraffic
    max_tokens: int

    def draw(self, seed: int) -> list[TraceRow]:
        """The requests by rising arrival time. Raises ValueError like the traffic."""
        most = self.max_tokens
        return [row._replace(output_tokens=min(row.output_tokens, most)) for row in self.traffic.draw(seed)]


Traffic = RecordedTraffic | DrawnTraffic | CutTraffic
