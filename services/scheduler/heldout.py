"""Losses of a job's checkpoints on its held-out examples, and which of them are bad."""

import math
from collections.abc import Iterable

from lemix.internal.v1 import work_pb2

#: Held-out losses remembered.
_MAX_LOSSES = 100


class HeldOutLosses:
    """A view of a job's record: what it is told stays in there. Losses are in nats per token."""

    def __init__(self, record: work_pb2.JobRecord) -> None:
        self._record = record

    def judge(self, node_id: str, checkpoint_id: str, loss: float) -> str:
        """Take over the loss of a node's checkpoint: "best" of all nodes so far, "good" or "bad"."""
        losses, job = self._record.heldout_losses, self._record.job
        best = self._best_loss()
        while len(losses) >= _MAX_LOSSES:
            del losses[max(losses, key=lambda name: losses[name])]
        losses[checkpoint_id] = loss if math.isfinite(loss) else math.inf
        job.heldout_loss = loss
        if self.is_bad(checkpoint_id):
            self._record.bad_evaluations[node_id] += 1
            return "bad"
        self._record.bad_evaluations.pop(node_id, None)
        if loss >= best:
            return "good"
        job.best_heldout_loss, job.best_checkpoint_id = loss, checkpoint_id
        return "best"

    def is_bad(self, checkpoint_id: str) -> bool:
        """Whether this checkpoint must not be published."""
        loss = self.loss_of(checkpoint_id)
        if loss is None:
            return False
        return not math.isfinite(loss) or loss > self._best_loss() + self._record.job.quality_gate.tolerance

    def _best_loss(self) -> float:
        return min(self._record.heldout_losses.values(), default=math.inf)

    def loss_of(self, checkpoint_id: str) -> float | None:
        """What was measured for a checkpoint."""
        return self._record.heldout_losses.get(checkpoint_id)

    def is_to_go_back(self, node_id: str) -> bool:
        """Whether enough evaluations of this node in a row were bad."""
        most = self._record.job.quality_gate.max_bad_evaluations
        return 0 < most <= self._record.bad_evaluations.get(node_id, 0)

    def best_of(self, checkpoint_ids: Iterable[str]) -> str | None:
        """The one with the smallest finite loss; None when none of them has one."""
        losses = self._record.heldout_losses
        known = [name for name in checkpoint_ids if math.isfinite(losses.get(name, math.inf))]
        return min(known, key=lambda name: losses[name], default=None)

    def went_back(self, node_id: str) -> None:
        """This node trains on from an earlier checkpoint."""
        self._record.bad_evaluations.pop(node_id, None)
