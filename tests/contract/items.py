"""Work for the ledger suites."""

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2


def request(task_id: str, prompt: tuple[int, ...] = (1, 2, 3)) -> work_pb2.WorkItem:
    """An inference task."""
    return work_pb2.WorkItem(task_id=task_id, inference=work_pb2.InferenceWork(prompt_token_ids=prompt))


def microbatch(job_id: str, sequence: int) -> work_pb2.WorkItem:
    """A training task."""
    work = work_pb2.TrainingWork(job_id=job_id, sequence=sequence, examples=[example(sequence)])
    return work_pb2.WorkItem(task_id=f"{job_id}/{sequence}", training=work)


def example(number: int) -> work_pb2.TrainingExample:
    """A training example told apart by its number."""
    return work_pb2.TrainingExample(token_ids=[number, number + 1])


def outcome(task_id: str, node_id: str = "", tokens: tuple[int, ...] = (7, 8)) -> work_pb2.WorkOutcome:
    """A finished inference task."""
    inference = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_STOP, token_ids=tokens)
    return work_pb2.WorkOutcome(task_id=task_id, node_id=node_id, inference=inference)


def cancelled(task_id: str, node_id: str = "") -> work_pb2.WorkOutcome:
    """An inference task whose client left."""
    inference = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_CANCELLED)
    return work_pb2.WorkOutcome(task_id=task_id, node_id=node_id, inference=inference)


def job(job_id: str, *, request_id: str = "", created_unix_s: float = 1.0, trained: int = 0) -> work_pb2.JobRecord:
    """A running job."""
    status = types_pb2.JOB_STATUS_RUNNING
    public = types_pb2.TrainingJob(
        job_id=job_id, created_unix_s=created_unix_s, status=status, trained_microbatches=trained
    )
    return work_pb2.JobRecord(job=public, request_id=request_id)
