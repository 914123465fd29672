"""Weight synchronisation between replicas: when a round starts, who takes part, and how it ends.

Phase one: every source copies its weights aside (TakeSnapshot). Phase two, when all copies exist: every target fetches
the sources' copies and changes its weights (ApplyWeights). One round at a time; a round that takes longer than the
timeout is abandoned, and the next one starts after the next `every_steps` steps.

A node that joins when others have trained is behind: it would pull an average back to where training began, and serve
what nobody serves any more. It is no source, gets no work, and takes over the weights of the source with most steps, in
a round that begins as soon as none runs, again after a pause when that fails. After the third time it serves all the
same (`WarnBehind`), and is brought up to date with the next round that is due anyway.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.scheduler.core.commands import ApplyWeights, Command, SyncMode, TakeSnapshot, WarnBehind
from services.scheduler.core.config import SyncChoice
from services.scheduler.core.events import SnapshotReady, SyncEnded
from services.scheduler.core.node_spec import NodeRole, NodeSpec
from services.scheduler.core.replicas import Replicas

#: Rounds that may fail to bring a node up to date before it serves with what it has, and the pause after each.
_MAX_FAILED = 3
_RETRY_PAUSE_S = 5.0


@dataclass(slots=True)
class _Round:
    sync_id: str
    begun_s: float
    deadline_s: float
    #: Nodes whose weights are read, nodes whose weights change; by id.
    sources: list[str]
    targets: list[str]
    #: Nodes still to answer in the phase that runs.
    pending: set[str]
    applying: bool = False
    #: In the second phase: whose weights a target was told to take.
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Synchroniser:
    """Coordinates rounds for the nodes it is told about. mode None: there are none."""

    def __init__(self, mode: SyncMode | None, *, every_steps: int, timeout_s: float) -> None:
        self._mode = mode
        self._every_steps = every_steps
        self._timeout_s = timeout_s
        self._roles: dict[str, NodeRole] = {}
        self._replicas = Replicas()
        #: No round of its own for nodes that are behind before that.
        self._retry_s = -math.inf
        #: Counts the changes to who is behind or used all the same, but for those of `joined` and `node_lost`.
        self.num_changes = 0
        #: The node that trains for all (`with_one_trainer`).
        self._trainer = ""
        self._round: _Round | None = None
        self._num_rounds = 0

    @property
    def sync_id(self) -> str:
        """The round that runs, "" if none."""
        return self._round.sync_id if self._round else ""

    @property
    def _are_rounds_on(self) -> bool:
        return self._mode is not None and self._every_steps > 0

    @property
    def wakeup_s(self) -> float | None:
        """When the running round is abandoned, or else a failed one is tried again; None: neither."""
        if self._round is not None:
            return self._round.deadline_s
        return self._retry_s if self._can_catch_up() else None

    def set_interval(self, every_steps: int) -> None:
        """Start rounds every so many steps of a node from now on; 0: none. A running round goes on."""
        self._every_steps = every_steps
        self.num_changes += 1

    # ----------------------------------------------------------------- nodes

    def joined(self, now_s: float, spec: NodeSpec) -> list[Command]:
        """A node is here, or has told anew what it is."""
        if self._replicas.is_same(spec):
            return []
        commands = self.node_lost(now_s, spec.node_id) if spec.node_id in self._replicas else []
        self._replicas.joined(spec)
        return commands

    def usable(self, node_ids: Sequence[str]) -> list[str]:
        """Those of the nodes that may get work: not who is behind and waits for a round, unless all do."""
        if not self._are_rounds_on or not self._replicas.behind:
            return list(node_ids)
        usable = [node_id for node_id in node_ids if not self._is_waiting(node_id)]
        return usable or list(node_ids)

    def _is_waiting(self, node_id: str) -> bool:
        return node_id in self._replicas.behind and self._replicas[node_id].num_failed < _MAX_FAILED

    def serving_only(self, roles: dict[str, NodeRole]) -> dict[str, NodeRole]:
        """Who is behind and is used all the same trains nothing while others can: it would be lost with the copy."""
        behind = self._replicas.behind
        if not self._are_rounds_on or not behind or behind.issuperset(roles):
            return roles
        return {
            node_id: NodeRole.SERVE if role is NodeRole.BOTH and node_id in behind else role
            for node_id, role in roles.items()
        }

    def set_roles(self, roles: dict[str, NodeRole]) -> None:
        """Nodes came or got another role. Lost nodes are told through `node_lost`."""
        if self._replicas.entered(roles.keys() - self._roles.keys()):
            self.num_changes += 1
        self._roles = dict(sorted(roles.items()))

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
        return node_id not in self._replicas.behind, self._replicas[node_id].steps

    def node_lost(self, now_s: float, node_id: str) -> list[Command]:
        """A node is gone: it leaves the running round, which goes on while it has a source and a target."""
        self._roles.pop(node_id, None)
        self._replicas.lost(node_id)
        return self._leave(now_s, node_id)

    def trained(self, node_id: str) -> None:
        """A node told that its weights were trained."""
        self._replicas.trained(node_id)

    # ----------------------------------------------------------------- rounds

    def catch_up(self, now_s: float) -> list[Command]:
        """Start a round for nodes that are behind, when there are such and none runs. Called after every event."""
        return self._start(now_s) if self._can_catch_up() and now_s >= self._retry_s else []

    def _can_catch_up(self) -> bool:
        if not self._replicas.behind or not self._may_start():
            return False
        return any(self._is_waiting(node_id) for node_id in self._roles) and _is_useful(*self._participants())

    def _may_start(self) -> bool:
        return self._round is None and self._are_rounds_on

    def optimizer_step(self, now_s: float, node_id: str) -> list[Command]:
        """A node made a step; starts a round when it is due and none runs."""
        if node_id not in self._replicas:
            return []
        if self._replicas.stepped(node_id):
            self.num_changes += 1
        is_due = self._replicas[node_id].steps_since_round >= self._every_steps
        return self._start(now_s) if is_due and self._may_start() else []

    def snapshot_ready(self, event: SnapshotReady) -> list[Command]:
        """Phase one is done on a node."""
        current = self._round
        if current is None or current.sync_id != event.sync_id or current.applying:
            return []
        current.pending.discard(event.node_id)
        return self._apply_when_ready()

    def sync_ended(self, now_s: float, event: SyncEnded) -> list[Command]:
        """Phase two is done on a node, or either phase failed there."""
        current = self._round
        if current is None or current.sync_id != event.sync_id:
            return []
        if not current.applying:
            return [] if event.ok else self._leave(now_s, event.node_id)
        if (
            event.ok
            and event.node_id in current.pending
            and self._replicas.shared(current.begun_s, event.node_id, current.told[event.node_id])
        ):
            self.num_changes += 1
        current.pending.discard(event.node_id)
        return [] if current.pending else self._end(now_s, current)

    def expire(self, now_s: float) -> list[Command]:
        """Abandon the round when its time is up."""
        current = self._round
        return self._end(now_s, current) if current is not None and now_s >= current.deadline_s else []

    def _end(self, now_s: float, current: _Round) -> list[Command]:
        self._round = None
        commands: list[Command] = []
        for node_id, num_failed in self._replicas.failed(current.targets):
            self._retry_s = now_s + _RETRY_PAUSE_S
            if num_failed == _MAX_FAILED:
                self.num_changes += 1
                commands.append(WarnBehind(node_id, num_failed))
        return commands

    def _start(self, now_s: float) -> list[Command]:
        sources, targets = self._participants()
        self._replicas.round_began()
        if not _is_useful(sources, targets):
            return []
        self._num_rounds += 1
        # The time keeps ids apart when the scheduler restarts and counts from one again.
        sync_id = f"sync-{self._num_rounds}-{round(now_s * 1e3)}"
        self._round = _Round(sync_id, now_s, now_s + self._timeout_s, sources, targets, set(sources))
        return [TakeSnapshot(sync_id, node_id) for node_id in sources]

    def _participants(self) -> tuple[list[str], list[str]]:
        """Sources and targets of a round that begins now."""
        behind = [node_id for node_id in self._roles if node_id in self._replicas.behind]
        current = [node_id for node_id in self._roles if node_id not in self._replicas.behind]
        if self._mode is SyncMode.AVERAGE:
            return current, list(self._roles)
        trainers = [node_id for node_id in current if self._roles[node_id] is not NodeRole.SERVE]
        serving = [node_id for node_id in current if self._roles[node_id] is not NodeRole.TRAIN]
        if trainers:
            source = self._replicas.most_steps(trainers)
            return [source], [node_id for node_id in serving if node_id != source] + behind
        if behind and current:
            return [self._replicas.most_steps(current)], behind  # the trainer is new
        return [], []  # they are about to leave

    def _apply_when_ready(self) -> list[Command]:
        current = self._round
        if current is None or current.pending:
            return []
        commands = [command for target in current.targets if (command := self._apply(current, target)).source_node_ids]
        current.applying = True
        current.told = {command.node_id: command.source_node_ids for command in commands}
        current.pending = set(current.told)
        return list[Command](commands)

    def _apply(self, current: _Round, target: str) -> ApplyWeights:
        if self._mode is SyncMode.AVERAGE and target not in self._replicas.behind:
            peers = tuple(source for source in current.sources if source != target)
            return ApplyWeights(current.sync_id, target, SyncMode.AVERAGE, peers)
        return ApplyWeights(current.sync_id, target, SyncMode.REPLACE, (self._replicas.most_steps(current.sources),))

    def _leave(self, now_s: float, node_id: str) -> list[Command]:
        current = self._round
        if current is None or (node_id not in current.sources and node_id not in current.targets):
            return []
        current.targets = [target for target in current.targets if target != node_id]
        current.pending.discard(node_id)
        if current.applying:
            # The others have their commands; who cannot fetch from the lost node reports a failed end.
            return [] if current.pending else self._end(now_s, current)
        current.sources = [source for source in current.sources if source != node_id]
        return self._apply_when_ready() if _is_useful(current.sources, current.targets) else self._end(now_s, current)


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
