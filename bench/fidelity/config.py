"""What `make fidelity` runs: every knob with its default."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.fidelity.workloads import EMULATED, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RealConfig:
    """The cluster of the real CPU engine, whose stage workers have a core each.

    The model has random weights: only times are looked at. It is large enough that nearly every operation takes longer
    than 5 ms.
    """

    nodes: int = 1
    stages: int = 2
    hidden: int = 512
    layers: int = 8
    max_context_tokens: int = 512
    max_batch: int = 4
    #: Lengths that occur, none of them in the profiler's grid; few, so that each comes often enough to tell noise.
    prompt_lengths: tuple[int, ...] = (40, 72, 104, 152, 200, 296)
    output_lengths: tuple[int, ...] = (6, 12, 24)
    #: Texts of a micro-batch: lengths besides those of the grid.
    training_lengths: tuple[int, ...] = (88, 160)
    #: Mean rate as a share of what the profile says the cluster can serve.
    load: float = 0.25
    seconds: float = 45.0
    warmup_requests: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedConfig:
    """The emulated cluster. The figures are those of an A100 node of Llama-2-7B's size, `time_scale` times as slow."""

    nodes: int = 2
    stages: int = 2
    time_scale: float = 4.0
    max_batch: int = 8
    seconds: float = 45.0
    warmup_requests: int = 8
    #: Runs of a workload whose first run and its simulation do not agree.
    runs_in_doubt: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityConfig:
    """Everything the command does."""

    seed: int = 0
    #: A check that everything runs: its figures decide nothing.
    quick: bool = False
    out: Path = Path("out/fidelity")
    #: Models, the same wherever results go.
    cache: Path = Path("out/cache")
    #: SLO in units of the predicted time of the mean request alone on its node.
    slo_units: float = 5.0
    #: Time after the last planned arrival within which every answer must be there.
    drain_s: float = 60.0
    start_timeout_s: float = 180.0
    workloads: tuple[Workload, ...] = EMULATED
    real: RealConfig = field(default_factory=RealConfig)
    emulated: EmulatedConfig = field(default_factory=EmulatedConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain form for the summary."""
        values = asdict(self)
        values["out"], values["cache"] = str(self.out), str(self.cache)
        values["workloads"] = {workload.name: asdict(workload) for workload in self.workloads}
        return values
