"""Which trained micro-batches are in the newest checkpoint, which are in none, and which the ledger may not know."""

from itertools import chain

from lemix.internal.v1 import work_pb2
from services.node_agent.checkpoint_manifest import Manifest, add_to_ranges

#: Jobs whose positions a checkpoint lists, the newest.
MAX_JOBS = 64


class CheckpointCoverage:
    """Trained micro-batches of one node, by their ends."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        #: Trained and in no checkpoint, by task id in the order of their steps.
        self._unsaved: dict[str, work_pb2.WorkOutcome] = {}
        #: In a checkpoint, and not known to be done in the ledger.
        self._unconfirmed: dict[str, work_pb2.WorkOutcome] = {}
        #: Ranges of sequence numbers in the newest checkpoint, by job.
        self._positions: dict[str, list[list[int]]] = {}

    @property
    def num_unsaved(self) -> int:
        """Micro-batches in no checkpoint."""
        return len(self._unsaved)

    @property
    def unsaved_jobs(self) -> set[str]:
        """Jobs of those."""
        return {outcome.training.job_id for outcome in self._unsaved.values()}

    def unsaved(self) -> list[work_pb2.WorkOutcome]:
        """Ends of micro-batches in no checkpoint."""
        return list(self._unsaved.values())

    def known_outcome(self, task_id: str) -> work_pb2.WorkOutcome | None:
        """The end of a micro-batch whose step the restored weights contain, although the ledger does not know."""
        return self._unconfirmed.get(task_id)

    def confirmed(self, task_id: str) -> None:
        """The ledger holds its end now."""
        self._unconfirmed.pop(task_id, None)

    def trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """A micro-batch was trained, and is in no checkpoint."""
        self._unsaved[outcome.task_id] = outcome

    def drop(self, task_id: str) -> work_pb2.WorkOutcome | None:
        """No checkpoint need list this micro-batch; None when it is in one, or was not trained."""
        return self._unsaved.pop(task_id, None)

    def at(self, step: int) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
        """What a checkpoint of this version contains: positions by job, and ends that the ledger may not know (hex of
        their wire form) by task id."""
        contained = [outcome for outcome in self._unsaved.values() if outcome.training.weight_step <= step]
        positions = dict(self._positions)
        for outcome in contained:
            job_id = outcome.training.job_id
            positions[job_id] = add_to_ranges(positions.pop(job_id, []), [outcome.training.sequence])
        unfinished = [*self._unconfirmed.values(), *contained]
        outcomes = {outcome.task_id: outcome.SerializeToString().hex() for outcome in unfinished}
        return dict(list(positions.items())[-MAX_JOBS:]), outcomes

    def saved(self, manifest: Manifest) -> list[work_pb2.WorkOutcome]:
        """There is a new checkpoint. Returns the ends that waited for it."""
        self._positions = manifest.positions
        contained = {task_id: self._unsaved.pop(task_id) for task_id in manifest.outcomes if task_id in self._unsaved}
        self._unconfirmed |= contained
        return list(contained.values())

    def start_from(self, manifest: Manifest) -> None:
        """The node starts with what this checkpoint contains."""
        self._positions = manifest.positions
        self._unconfirmed = self._ends(manifest)

    def go_on_from(self, manifest: Manifest) -> None:
        """The running node takes over this checkpoint; what was trained since counts as trained."""
        for job_id, ranges in manifest.positions.items():
            # Of another node's the positions are new here; one's own contain them.
            numbers = chain.from_iterable(range(first, last + 1) for first, last in ranges)
            self._positions[job_id] = add_to_ranges(self._positions.get(job_id, []), numbers)
        if manifest.node_id != self._node_id:
            self._unconfirmed |= self._ends(manifest)

    def _ends(self, manifest: Manifest) -> dict[str, work_pb2.WorkOutcome]:
        """Ends of micro-batches in a checkpoint that the ledger may not know, as this node's own."""
        ends = {}
        for task_id, stored in manifest.outcomes.items():
            ends[task_id] = outcome = work_pb2.WorkOutcome.FromString(bytes.fromhex(stored))
            outcome.node_id = self._node_id
        return ends
