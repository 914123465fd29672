"""Weight synchronisation between replicas: when a round starts, who takes part, and how it ends.

Phase one: every source copies its weights aside (TakeSnapshot). Phase two, when all copies exist: every target fetches
the sources' copies and changes its weights (ApplyWeights). One round at a time; a round that takes longer than the
timeout is abandoned, and the next one starts after the next `every_steps` steps.

A node that joins when others have trained is behind: it would pull an average back to where training began. It is no
source, and takes over the weights of the source with most steps, in a round that begins as soon as none runs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.scheduler.core.types import (
    ApplyWeights,
    Command,
    NodeRole,
    SnapshotReady,
    SyncChoice,
    SyncEnded,
    SyncMode,
    TakeSnapshot,
)


@dataclass(slots=True)
class _Round:
    sync_id: str
    deadline_s: float
    #: Nodes whose weights are read, nodes whose weights change; by id.
    sources: list[str]
    targets: list[str]
    #: Nodes still to answer in the phase that runs.
    pending: set[str]
    applying: bool = False


class Synchroniser:
    """Coordinates rounds for the nodes it is told about. mode None: there are none."""

    def __init__(self, mode: SyncMode | None, *, every_steps: int, timeout_s: float) -> None:
        self._mode = mode
        self._every_steps = every_steps
        self._timeout_s = timeout_s
        self._roles: dict[str, NodeRole] = {}
        #: Optimizer steps since the node joined, and since the last round began.
        self._steps: dict[str, int] = {}
        self._steps_since_round: dict[str, int] = {}
        #: Nodes whose weights are no longer the ones that training began with; nodes that lack what others trained.
        self._trained: set[str] = set()
        self._behind: set[str] = set()
        self._is_catch_up_due = False
        #: The node that trains for all (`with_one_trainer`).
        self._trainer = ""
        self._round: _Round | None = None
        self._num_rounds = 0

    @property
    def sync_id(self) -> str:
        """The round that runs, "" if none."""
        return self._round.sync_id if self._round else ""

    @property
    def deadline_s(self) -> float | None:
        """When the running round is abandoned."""
        return self._round.deadline_s if self._round else None

    def set_interval(self, every_steps: int) -> None:
        """Start rounds every so many steps of a node from now on; 0: none. A running round goes on."""
        self._every_steps = every_steps

    def set_roles(self, roles: dict[str, NodeRole], *, restored: Collection[str]) -> None:
        """Nodes came or got another role. Lost nodes are told through `node_lost`. restored: nodes that started from a
        checkpoint, and so are never behind."""
        self._roles = dict(sorted(roles.items()))
        for node_id in self._roles:
            if node_id not in self._steps:
                self._steps[node_id] = self._steps_since_round[node_id] = 0
                if node_id in restored:
                    self._trained.add(node_id)
                elif self._trained:
                    self._behind.add(node_id)
                    self._is_catch_up_due = True

    def with_one_trainer(self, roles: dict[str, NodeRole]) -> dict[str, NodeRole]:
        """Of the nodes that would serve and train, one trains and the others only serve: their own steps would be lost
        with the next copy. It stays the same one while it can; its successor is the current node with most steps."""
        candidates = sorted(node_id for node_id, role in roles.items() if role is NodeRole.BOTH)
        if not candidates:
            return roles
        if self._trainer not in candidates:
            # max() keeps the first of equals: the lowest id.
            self._trainer = max(candidates, key=self._progress)
        return {
            node_id: NodeRole.SERVE if role is NodeRole.BOTH and node_id != self._trainer else role
            for node_id, role in roles.items()
        }

    def _progress(self, node_id: str) -> tuple[bool, int]:
        is_current = node_id in self._steps and node_id not in self._behind
        return is_current, self._steps.get(node_id, 0)

    def node_lost(self, node_id: str) -> list[Command]:
        """A node is gone: it leaves the running round, which goes on while it has a source and a target."""
        self._roles.pop(node_id, None)
        self._steps.pop(node_id, None)
        self._steps_since_round.pop(node_id, None)
        self._trained.discard(node_id)
        self._behind.discard(node_id)
        if self._behind.issuperset(self._steps):
            self._behind.clear()  # who knew more is gone
        return self._leave(node_id)

    def catch_up(self, now_s: float) -> list[Command]:
        """Start a round for nodes that have joined, when there are such and none runs."""
        return self._start(now_s) if self._is_catch_up_due and self._may_start() else []

    def _may_start(self) -> bool:
        return self._round is None and self._every_steps > 0 and self._mode is not None

    def optimizer_step(self, now_s: float, node_id: str) -> list[Command]:
        """A node made a step; starts a round when it is due and none runs."""
        if node_id not in self._steps:
            return []
        self._steps[node_id] += 1
        self._steps_since_round[node_id] += 1
        self._trained.add(node_id)
        if not self._may_start() or self._steps_since_round[node_id] < self._every_steps:
            return self.catch_up(now_s)
        return self._start(now_s)

    def snapshot_ready(self, event: SnapshotReady) -> list[Command]:
        """Phase one is done on a node."""
        current = self._round
        if current is None or current.sync_id != event.sync_id or current.applying:
            return []
        current.pending.discard(event.node_id)
        return self._apply_when_ready()

    def sync_ended(self, event: SyncEnded) -> list[Command]:
        """Phase two is done on a node, or either phase failed there."""
        current = self._round
        if current is None or current.sync_id != event.sync_id:
            return []
        if not current.applying:
            return [] if event.ok else self._leave(event.node_id)
        if event.ok and event.node_id in current.pending:
            self._behind.discard(event.node_id)
            self._trained.add(event.node_id)
        current.pending.discard(event.node_id)
        if not current.pending:
            self._round = None
        return []

    def expire(self, now_s: float) -> None:
        """Abandon the round when its time is up."""
        if self._round is not None and now_s >= self._round.deadline_s:
            self._round = None

    def _start(self, now_s: float) -> list[Command]:
        sources, targets = self._participants()
        self._steps_since_round = dict.fromkeys(self._steps_since_round, 0)
        self._is_catch_up_due = False
        if not _is_useful(sources, targets):
            return []
        self._num_rounds += 1
        # The time keeps ids apart when the scheduler restarts and counts from one again.
        sync_id = f"sync-{self._num_rounds}-{round(now_s * 1e3)}"
        self._round = _Round(sync_id, now_s + self._timeout_s, sources, targets, set(sources))
        return [TakeSnapshot(sync_id, node_id) for node_id in sources]

    def _participants(self) -> tuple[list[str], list[str]]:
        """Sources and targets of a round that begins now."""
        behind = [node_id for node_id in self._roles if node_id in self._behind]
        current = [node_id for node_id in self._roles if node_id not in self._behind]
        if self._mode is SyncMode.AVERAGE:
            return current, list(self._roles)
        trainers = [node_id for node_id in current if self._roles[node_id] is not NodeRole.SERVE]
        serving = [node_id for node_id in current if self._roles[node_id] is not NodeRole.TRAIN]
        if trainers:
            source = self._most_steps(trainers)
            return [source], [node_id for node_id in serving if node_id != source] + behind
        if behind and current:
            return [self._most_steps(current)], behind  # the trainer is new
        return [], []  # they are about to leave

    def _most_steps(self, node_ids: Sequence[str]) -> str:
        # max() keeps the first of equals: the lowest id.
        return max(node_ids, key=lambda node_id: self._steps.get(node_id, 0))

    def _apply_when_ready(self) -> list[Command]:
        current = self._round
        if current is None or current.pending:
            return []
        commands = [command for target in current.targets if (command := self._apply(current, target)).source_node_ids]
        current.applying = True
        current.pending = {command.node_id for command in commands}
        return list[Command](commands)

    def _apply(self, current: _Round, target: str) -> ApplyWeights:
        if self._mode is SyncMode.AVERAGE and target not in self._behind:
            peers = tuple(source for source in current.sources if source != target)
            return ApplyWeights(current.sync_id, target, SyncMode.AVERAGE, peers)
        return ApplyWeights(current.sync_id, target, SyncMode.REPLACE, (self._most_steps(current.sources),))

    def _leave(self, node_id: str) -> list[Command]:
        current = self._round
        if current is None or (node_id not in current.sources and node_id not in current.targets):
            return []
        if current.applying:
            # The others have their commands; who cannot fetch from the lost node reports a failed end.
            current.pending.discard(node_id)
            if not current.pending:
                self._round = None
            return []
        current.sources = [source for source in current.sources if source != node_id]
        current.targets = [target for target in current.targets if target != node_id]
        current.pending.discard(node_id)
        if not _is_useful(current.sources, current.targets):
            self._round = None
            return []
        return self._apply_when_ready()


def sync_mode(choice: SyncChoice, of_policy: SyncMode) -> SyncMode | None:
    """What rounds do to the weights; None: there are none."""
    match choice:
        case SyncChoice.POLICY:
            return of_policy
        case SyncChoice.NONE:
            return None
        case SyncChoice.AVERAGE:
            return SyncMode.AVERAGE
        case SyncChoice.CHECKPOINT:
            return SyncMode.REPLACE


def _is_useful(sources: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether some target would get another node's weights."""
    return any(source != target for source in sources for target in targets)
