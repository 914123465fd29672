"""What a job's record says of it as it is: asked for once, and its status."""

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2

_ENDED = frozenset({types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED, types_pb2.JOB_STATUS_CANCELLED})


class JobFacts:
    """Reads a record that others write."""

    def __init__(self, record: work_pb2.JobRecord) -> None:
        self._record = record

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self._record.job.job_id

    @property
    def status(self) -> types_pb2.JobStatus:
        """State now."""
        return self._record.job.status

    @property
    def ended(self) -> bool:
        """Whether nothing more will run."""
        return self.status in _ENDED

    @property
    def paused(self) -> bool:
        """Whether its owner holds it."""
        return self.status == types_pb2.JOB_STATUS_PAUSED

    @property
    def endless(self) -> bool:
        """Whether it trains feedback as it comes."""
        return not self._record.job.training_file

    @property
    def file_id(self) -> str:
        """File with its examples."""
        return self._record.job.training_file or f"file-{self.job_id}"

    @property
    def num_examples(self) -> int:
        """Examples in the file."""
        return self._record.job.num_examples

    @property
    def lora(self) -> types_pb2.Lora | None:
        """The adapter it trains; None: it trains the weights themselves."""
        return self._record.job.lora if self._record.job.HasField("lora") else None

    @property
    def is_isolated(self) -> bool:
        """Whether its adapter serves only requests that name it."""
        return self._record.job.mode == types_pb2.TRAINING_MODE_ISOLATED

    @property
    def hyperparameters(self) -> types_pb2.Hyperparameters:
        """In force, defaults filled in."""
        return self._record.job.hyperparameters

    @property
    def checkpoint(self) -> types_pb2.CheckpointPolicy:
        """When nodes save checkpoints for it."""
        return self._record.job.checkpoint

    @property
    def validation_file(self) -> str:
        """File with its held-out examples; empty: none."""
        return self._record.job.validation_file

    @property
    def quality_gate(self) -> types_pb2.QualityGate:
        """What is done with the loss on them, defaults filled in."""
        return self._record.job.quality_gate

    @property
    def total_microbatches(self) -> int:
        """Of the whole job; 0 without an end."""
        return self._record.job.total_microbatches

    @property
    def attempt(self) -> int:
        """How often it went on after it had ended."""
        return self._record.attempt

    def task_id(self, sequence: int) -> str:
        """Id of a micro-batch. The ledger remembers ended ones: what goes on after the job's end has others."""
        return f"{self.job_id}/{sequence}/{self.attempt}" if self.attempt else f"{self.job_id}/{sequence}"
