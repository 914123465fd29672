"""Settings of the profiler."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from services.runtime.config import ServiceSettings, Settings


class OpGrid(Settings):
    """Points of one operation: every batch with every length."""

    batches: tuple[PositiveInt, ...] = Field(min_length=1)
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)


class CachedGrid(Settings):
    """Prefills of one sequence: every length behind every number of tokens that are in the KV cache already."""

    lengths: tuple[PositiveInt, ...] = ()
    cached_tokens: tuple[PositiveInt, ...] = ()


class MixedGrid(Settings):
    """Prefills of one sequence with requests that decode in the same operation: every length with every number."""

    lengths: tuple[PositiveInt, ...] = ()
    decodes: tuple[PositiveInt, ...] = ()
    #: Context tokens of each of these.
    decode_length: int = Field(default=256, ge=1)


class GridSettings(Settings):
    """What is measured. Sized so that a model of a few million parameters on a CPU takes seconds.

    Batches, lengths, cached tokens and bytes beyond the node's limits are lowered to them.
    """

    prefill: OpGrid = OpGrid(batches=(1, 2, 4), lengths=(16, 48, 128, 256, 512))
    #: Lengths are context tokens.
    decode: OpGrid = OpGrid(batches=(1, 4, 16), lengths=(16, 64, 256, 512))
    #: Forward and backward of a micro-batch.
    train: OpGrid = OpGrid(batches=(1, 2, 4), lengths=(16, 48, 128, 256, 512))
    #: Points of prefill and training with more tokens (batch * length) are left out.
    max_point_tokens: int = Field(default=2048, ge=1)
    #: Time the optimizer step and the weight synchronisation too.
    whole_model_ops: bool = True
    cached: CachedGrid = CachedGrid(lengths=(16, 128), cached_tokens=(128, 384))
    mixed: MixedGrid = MixedGrid(lengths=(32, 128), decodes=(2, 8))
    #: Bytes that are offloaded and reloaded. Empty: the host link is not measured.
    move_bytes: tuple[PositiveInt, ...] = (1 << 18, 1 << 20, 1 << 22)
    #: Time a few points of serving and training while the node's other stages train or decode, too.
    co_run: bool = True

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        for name, grid in (("prefill", self.prefill), ("train", self.train)):
            smallest = min(grid.batches) * min(grid.lengths)
            if smallest > self.max_point_tokens:
                raise ValueError(f"max_point_tokens leaves no point of {name}, whose smallest has {smallest} tokens")
        return self


class ProfilerSettings(ServiceSettings):
    """Settings of `python -m services.profiler` (`LEMIX_PROFILER_...`)."""

    listen: str = "127.0.0.1:50071"
    #: Where profiles are kept: `<directory>/<fingerprint>/<version>.json`.
    directory: str = "out/profiles"
    #: Timed repetitions per point.
    repetitions: int = Field(default=6, ge=2, le=100)
    #: Rounds over all points that the repetitions are spread over, so that a slow minute of the machine does not
    #: fall on a few points alone.
    rounds: int = Field(default=3, ge=1, le=100)
    #: Untimed repetitions per point and round.
    warmup: int = Field(default=1, ge=0, le=10)
    grid: GridSettings = GridSettings()
    #: Longest time to measure a node, seconds; the points that matter most come first. A call may name another.
    budget_s: float = Field(default=180.0, gt=0)
    #: Longest wait for the next point, seconds.
    measure_timeout_s: float = Field(default=300.0, gt=0)
    #: Deadline of connecting to a node and asking what it is, seconds.
    connect_timeout_s: float = Field(default=10.0, gt=0)
    #: Nodes measured at once. Nodes that share a machine disturb each other's timings.
    concurrent_nodes: int = Field(default=1, ge=1)
    #: ProfileNode calls that run or wait; more are refused with OVERLOADED.
    max_calls: int = Field(default=64, ge=1)
