"""What is known of the weights of every node: which process holds them, and who lacks what others trained."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.scheduler.core.node_spec import NodeSpec

#: Lost nodes that are remembered, those lost last.
_MAX_LOST = 64


@dataclass(slots=True)
class Replica:
    """The weights of one process of a node."""

    #: Of the process; 0: not told.
    incarnation: int
    #: Optimizer steps made since it joined, and since the last round began.
    steps: int = 0
    steps_since_round: int = 0
    #: They are no longer those that training began with.
    is_trained: bool = False
    #: They lack what others trained.
    is_behind: bool = False
    #: Rounds in a row that were to bring them up to date and did not.
    num_failed: int = 0
    #: When the newest round began that passed on all that was trained here; minus infinity: none did.
    shared_s: float = -math.inf


class Replicas:
    """The replicas of connected nodes, and of nodes that were lost and may come back."""

    def __init__(self) -> None:
        self._here: dict[str, Replica] = {}
        self._lost: dict[str, Replica] = {}
        #: Connected nodes that are behind. Kept because it is asked for at every event.
        self.behind: set[str] = set()
        #: When the newest round began that reached anybody.
        self._shared_s = -math.inf

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._here

    def __getitem__(self, node_id: str) -> Replica:
        return self._here[node_id]

    def is_same(self, spec: NodeSpec) -> bool:
        """Whether the node is connected, with the same process."""
        known = self._here.get(spec.node_id)
        return known is not None and known.incarnation == spec.incarnation

    def joined(self, spec: NodeSpec) -> None:
        """A node that was not connected is here."""
        before = self._lost.pop(spec.node_id, None)
        if before is not None and before.incarnation == spec.incarnation != 0:
            replica = before  # nothing happened to its weights: what it trained is in them
        else:
            was_anybody_trained = self._is_anybody_trained() or (before is not None and before.is_trained)
            replica = self._new(spec, before)
            if replica.is_trained and not replica.is_behind and not was_anybody_trained:
                # This scheduler is younger than the training: who joined before without any has missed it.
                self._mark_behind(self._here)
        self._here[spec.node_id] = replica
        if replica.is_behind:
            self.behind.add(spec.node_id)

    def _new(self, spec: NodeSpec, before: Replica | None) -> Replica:
        replica = Replica(spec.incarnation, is_trained=spec.trained_s is not None)
        if spec.trained_s is None:
            replica.is_behind = self._is_anybody_trained()
        else:
            # Weights of a checkpoint. If all that they contain was passed on before the others went on, they are old.
            replica.shared_s = self._shared_s if before is None else before.shared_s
            replica.is_behind = spec.trained_s <= replica.shared_s
        return replica

    def _is_anybody_trained(self) -> bool:
        return any(replica.is_trained for known in (self._here, self._lost) for replica in known.values())

    def _mark_behind(self, node_ids: Iterable[str]) -> bool:
        untrained = {node_id for node_id in node_ids if not self._here[node_id].is_trained} - self.behind
        for node_id in untrained:
            self._here[node_id].is_behind = True
        self.behind |= untrained
        return bool(untrained)

    def entered(self, node_ids: Iterable[str]) -> bool:
        """These nodes got a role that they had not. Returns whether some are behind who were not: others have trained
        while they had none."""
        return self._is_anybody_trained() and self._mark_behind(node_ids)

    def lost(self, node_id: str) -> None:
        """A node is gone."""
        replica = self._here.pop(node_id, None)
        if replica is not None:
            self.behind.discard(node_id)
            self._lost[node_id] = replica
            self._lost = dict(list(self._lost.items())[-_MAX_LOST:])

    def stepped(self, node_id: str) -> bool:
        """A node made an optimizer step. Returns whether who was behind no longer is: training goes on without those
        who knew more."""
        replica = self._here[node_id]
        replica.steps += 1
        replica.steps_since_round += 1
        replica.is_trained = True
        if len(self.behind) < len(self._here):
            return False
        for other_id in list(self.behind):
            self._is_current(other_id)
        return True

    def trained(self, node_id: str) -> None:
        """The node told that its weights were trained, by whomever."""
        if node_id in self._here:
            self._here[node_id].is_trained = True

    def shared(self, begun_s: float, target: str, sources: Iterable[str]) -> bool:
        """A node took over what these had when the round began. Returns whether it was behind."""
        self._shared_s = max(self._shared_s, begun_s)
        for node_id in (target, *sources):
            if node_id in self._here:
                self._here[node_id].shared_s = begun_s
        if target not in self._here:
            return False
        self._here[target].is_trained = True
        return self._is_current(target)

    def _is_current(self, node_id: str) -> bool:
        was_behind = node_id in self.behind
        self.behind.discard(node_id)
        self._here[node_id].is_behind = False
        self._here[node_id].num_failed = 0
        return was_behind

    def round_began(self) -> None:
        """Count steps anew."""
        for replica in self._here.values():
            replica.steps_since_round = 0

    def most_steps(self, node_ids: Iterable[str]) -> str:
        """Of these nodes (at least one) the one that made most steps."""
        # max() keeps the first of equals: the lowest id.
        return max(node_ids, key=lambda node_id: self._here[node_id].steps if node_id in self._here else 0)

    def failed(self, node_ids: Iterable[str]) -> Iterator[tuple[str, int]]:
        """A round is over; of these nodes those that are behind still, each with how often that happened in a row."""
        for node_id in sorted(self.behind.intersection(node_ids)):
            self._here[node_id].num_failed += 1
            yield node_id, self._here[node_id].num_failed
