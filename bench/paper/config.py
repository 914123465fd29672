"""What `make paper` runs, checked before anything starts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.machine import usable_cores
from bench.paper import scenario
from bench.paper.traffic import LENGTHS
from services.scheduler.core.policies import POLICIES
from services.simulator.types import SimulationConfig

BASELINE, SUBJECT = "separate", "lemix"
#: Every registered policy, the baseline first and LeMix last.
ALL_POLICIES = (BASELINE, *(name for name in sorted(POLICIES) if name not in (BASELINE, SUBJECT)), SUBJECT)
_PUBLISHED = (BASELINE, "round_robin", "paper_additive", "paper_ratio", "paper_released", SUBJECT)
#: What the published figures compare.
DEFAULT_POLICIES = tuple(name for name in ALL_POLICIES if name in _PUBLISHED)
#: Seeds 100-102 are for choosing defaults of policies; reported figures come from others.
TUNING_SEEDS = range(100, 103)
FULL_SEEDS = tuple(range(10))


class PaperError(ValueError):
    """An option that makes no sense; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperConfig:
    """The grid is every combination of rates (tasks/s), training shares and mean forwards, per policy and seed.

    The other axes are looked at on `axis_rates` x `axis_shares` at one mean forward. full: without the cuts that keep a
    run short, on fewer seeds and tasks. only: names of the families to run; empty: all.
    """

    policies: tuple[str, ...] = DEFAULT_POLICIES
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (4.0, 8.0, 16.0, 24.0, 32.0)
    training_shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    mean_forwards_s: tuple[float, ...] = (0.03, 0.06, 0.114)
    axis_rates: tuple[float, ...] = (8.0, 16.0, 32.0)
    axis_shares: tuple[float, ...] = (0.1, 0.5, 0.9)
    axis_forward_s: float = 0.06
    stress_rates: tuple[float, ...] = (50.0, 75.0, 100.0, 125.0, 150.0)
    num_tasks: int = 1000
    days: float = 7.0
    full: bool = False
    only: tuple[str, ...] = ()
    processes: int = 0
    out: Path = Path("out/paper")

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise PaperError(f"--policies: unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
        rules = (
            (BASELINE in self.policies, f"--policies must name {BASELINE}, which the others are compared with"),
            (len(set(self.policies)) == len(self.policies), "--policies names a policy twice"),
            (bool(self.seeds), "--seeds names no seed"),
            (len(set(self.seeds)) == len(self.seeds), "--seeds names a seed twice"),
            (not set(self.seeds) & set(TUNING_SEEDS), "--seeds: 100 to 102 are kept for tuning"),
            (self.processes >= 0, "--processes must not be negative"),
        )
        for holds, message in rules:
            if not holds:
                raise PaperError(message)

    @property
    def num_processes(self) -> int:
        """Worker processes; by default one per core."""
        return self.processes or usable_cores()

    @property
    def first_seed(self) -> tuple[int, ...]:
        """For what takes many runs: one seed, unless everything is asked for."""
        return self.seeds if self.full else self.seeds[:1]

    @property
    def few_tasks(self) -> int:
        """For what takes many runs or operations: three tenths of the tasks, unless everything is asked for."""
        return self.num_tasks if self.full else max(1, self.num_tasks * 3 // 10)

    def points(self) -> list[scenario.Point]:
        """Places of the grid, in order."""
        return [
            scenario.Point(rate, share, forward_s)
            for forward_s in self.mean_forwards_s
            for share in self.training_shares
            for rate in self.rates
        ]

    def axis_points(self) -> list[scenario.Point]:
        """Places at which the other axes are looked at."""
        forward_s = self.axis_forward_s
        return [scenario.Point(rate, share, forward_s) for share in self.axis_shares for rate in self.axis_rates]

    def to_json(self) -> dict[str, Any]:
        """Plain form for the summary, with what the scenario fixes."""
        example = scenario.configuration(scenario.Run(self.points()[0], BASELINE, 0, 1))
        return {
            **asdict(self),
            "out": str(self.out),
            "nodes": scenario.NODES,
            "stages": scenario.STAGES,
            "mode": scenario.PREFILL,
            "slo_units": scenario.SLO_UNITS,
            "lengths": asdict(LENGTHS.shape),
            "node": {**scenario.NODE, "max_training_parts": scenario.MAX_TRAINING_PARTS},
            "scheduler": dict(scenario.SCHEDULER),
            "simulation": _simulation(example),
        }


def _simulation(config: SimulationConfig) -> dict[str, Any]:
    """Settings of the simulator that no run changes."""
    values = asdict(config)
    for name in ("core", "seed", "noise", "keep_ops", "horizon_s"):
        del values[name]
    return values
