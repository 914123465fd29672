"""Whom the agent's loop tells what happens, and how it ends when the node cannot go on."""

from collections.abc import Sequence
from typing import Protocol

from lemix.internal.v1 import scheduler_service_pb2, work_pb2


class NodeBroken(RuntimeError):
    """The node cannot go on (a stage worker died, or its weights no longer belong together). Its work stays in the
    ledger for other nodes."""


class Listener(Protocol):
    """Who is told what happens to tasks. Called in the order of events; must not block."""

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """A request produced tokens. logprobs: one per token, if it wants them."""

    def on_trace(self, trace: scheduler_service_pb2.OpTrace) -> None:
        """An op ended."""

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """A task ended; once per task."""
