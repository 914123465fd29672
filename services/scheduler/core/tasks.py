"""Work as the scheduler core sees it: requests and micro-batches. Immutable; lengths are in tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SloTarget:
    """Response-time promise; None: that part is not checked."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class InferenceTask:
    """A request to serve. `max_tokens` bounds the output, whose real length nobody knows yet unless it is fixed."""

    task_id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    slo: SloTarget = SloTarget()
    session_id: str = ""
    #: Most seconds since the newest optimizer step in the weights that serve it; None: any weights will do.
    max_staleness_s: float | None = None
    #: Isolated adapter that serves it; only nodes that hold it can. Empty: the model itself.
    adapter_id: str = ""
    #: Request of which it is a further choice: the same prompt. Empty: of none.
    choice_of: str = ""
    #: Nothing ends its output before `max_tokens`.
    fixed_output: bool = False


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One micro-batch of a job: `batch` examples padded to `length` tokens."""

    task_id: str
    arrival_s: float
    job_id: str
    batch: int
    length: int
    #: Micro-batches per optimizer step of its job.
    accumulation: int = 1
    #: Its job trains an adapter, which takes less than the training that was profiled.
    trains_adapter: bool = False


Task = InferenceTask | TrainingTask
