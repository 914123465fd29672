"""Settings of the profiler."""

from pydantic import Field

from services.runtime.config import ServiceSettings, Settings


class OpGrid(Settings):
    """Points of one operation: every batch with every length."""

    batches: tuple[int, ...] = Field(min_length=1)
    lengths: tuple[int, ...] = Field(min_length=1)


class GridSettings(Settings):
    """What is measured. Sized so that a model of a few million parameters on a CPU takes seconds.

    Batches and lengths beyond the node's limits are lowered to them.
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


class ProfilerSettings(ServiceSettings):
    """Settings of `python -m services.profiler` (`LEMIX_PROFILER_...`)."""

    listen: str = "127.0.0.1:50071"
    #: Where profiles are kept: `<directory>/<fingerprint>/<version>.json`.
    directory: str = "out/profiles"
    #: Timed repetitions per point.
    repetitions: int = Field(default=5, ge=2, le=100)
    #: Untimed repetitions per point.
    warmup: int = Field(default=1, ge=0, le=10)
    grid: GridSettings = GridSettings()
    #: Deadline of a whole measurement, seconds.
    measure_timeout_s: float = Field(default=300.0, gt=0)
    #: Deadline of connecting to a node and asking what it is, seconds.
    connect_timeout_s: float = Field(default=10.0, gt=0)
    #: Nodes measured at once. Nodes that share a machine disturb each other's timings.
    concurrent_nodes: int = Field(default=1, ge=1)
    #: ProfileNode calls that run or wait; more are refused with OVERLOADED.
    max_calls: int = Field(default=64, ge=1)
