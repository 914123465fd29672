"""What a placement policy is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from services.scheduler.core.commands import NodeTerms, SyncMode
from services.scheduler.core.events import Event
from services.scheduler.core.forecast import NodeForecast
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState

Options = dict[str, float | int | str | bool]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a task goes and why: terms of every candidate.

    cached_tokens: tokens of its prompt that the policy expects the node to keep of the turns before. queue_ttft_s: see
    `Assign`; is_demoted: it lets others pass.
    """

    node: NodeState
    terms: tuple[NodeTerms, ...] = ()
    cached_tokens: int = 0
    queue_ttft_s: float | None = None
    is_demoted: bool = False


@dataclass(frozen=True, slots=True)
class TrainingPlacement:
    """Where a micro-batch goes; `node` None: held back everywhere.

    held_back: candidates that may not get training now. retry_s: when that may change although nothing happens.
    parts: pieces its operations are cut into.
    """

    node: NodeState | None
    terms: tuple[NodeTerms, ...] = ()
    held_back: Sequence[NodeState] = ()
    retry_s: float = float("inf")
    parts: int = 1


class Policy(Protocol):
    """Decides where work goes. Candidates are never empty, sorted by node id (see `fastest_first`), and below their
    in-flight bounds."""

    @property
    def queue_order(self) -> QueueOrder:
        """Order of the nodes' stage queues under this policy."""
        ...

    @property
    def sync_mode(self) -> SyncMode:
        """What a synchronisation does to the weights under this policy."""
        ...

    @property
    def uses_forecast(self) -> bool:
        """Whether the core keeps the per-stage forecast of the paper for this policy."""
        ...

    @property
    def fastest_first(self) -> bool:
        """Whether nodes are sorted by their speed before their ids."""
        ...

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Role of every node; `node_ids` is sorted. A node left out gets no work.

        Asked again whenever a node comes or goes, and when `Observer.observe` says so.
        """
        ...

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """Node for a request."""
        ...

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """Node for a micro-batch, or hold it back. Without `may_hold` (starvation bound) a node must be named."""
        ...


@runtime_checkable
class Observer(Protocol):
    """A policy that also looks at what happens. Optional: the core asks nothing of the others."""

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Sees every event when the core's state is up to date with it, before work is placed. True: ask `roles` again.

        When a node joined it may replace that node's `costs` and `forecast`; it changes nothing else of the cluster.
        """
        ...


@dataclass(slots=True)
class Turn:
    """Takes candidates in turn, by node id, also while the set of candidates changes."""

    _last_id: str = ""

    def next(self, candidates: Sequence[NodeState]) -> NodeState:
        """The first candidate after the one taken last."""
        chosen = candidates[0]
        for node in candidates:
            if node.spec.node_id > self._last_id:
                chosen = node
                break
        self._last_id = chosen.spec.node_id
        return chosen


def turn_terms(chosen: NodeState, candidates: Sequence[NodeState]) -> tuple[NodeTerms, ...]:
    """Terms of a policy that predicts nothing: 1 for the node whose turn it is."""
    return tuple(NodeTerms(node.spec.node_id, 0.0, 0.0, 0.0, 0.0, float(node is chosen)) for node in candidates)


def forecast_of(node: NodeState) -> NodeForecast:
    """The node's forecast. Raises ValueError under a policy that keeps none (`uses_forecast`)."""
    if node.forecast is None:
        raise ValueError(f"node {node.node_id} has no forecast under this policy")
    return node.forecast


def every_node(role: NodeRole, node_ids: Sequence[str]) -> dict[str, NodeRole]:
    """The same role for all."""
    return dict.fromkeys(node_ids, role)


@dataclass(frozen=True, slots=True)
class InTurn:
    """Placement of both kinds of work in turn; the shared half of the baselines."""

    _requests: Turn = field(default_factory=Turn)
    _microbatches: Turn = field(default_factory=Turn)

    def request(self, candidates: Sequence[NodeState]) -> Placement:
        """Next node for a request."""
        node = self._requests.next(candidates)
        return Placement(node, turn_terms(node, candidates))

    def microbatch(self, candidates: Sequence[NodeState]) -> TrainingPlacement:
        """Next node for a micro-batch."""
        node = self._microbatches.next(candidates)
        return TrainingPlacement(node, turn_terms(node, candidates))


def check_choice(policy: str, options: Options, name: str, choices: Sequence[str]) -> str:
    """Value of an option that is one of `choices`, by default the first. Raises ValueError for any other."""
    value = options.get(name, choices[0])
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"option {name!r} of policy {policy!r} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_options(
    policy: str, options: Options, known: Mapping[str, float], others: Sequence[str] = ()
) -> dict[str, float]:
    """Values of a policy's options: the defaults in `known`, overridden by `options`.

    The default tells the kind: a bool, a whole number >= 0 (int) or a number >= 0 (float). others: options that are not
    checked here. Raises ValueError naming an unknown option or one of another kind.
    """
    values = dict(known)
    for name, value in options.items():
        if name in others:
            continue
        if name not in known:
            choices = ", ".join(sorted([*known, *others])) or "none"
            raise ValueError(f"policy {policy!r} has no option {name!r}; known: {choices}")
        if isinstance(value, str) or not _is_of_kind(value, known[name]):
            raise ValueError(f"option {name!r} of policy {policy!r} must be {_kind(known[name])}, got {value!r}")
        values[name] = value
    return values


def _kind(default: float) -> str:
    if isinstance(default, bool):
        return "true or false"
    return "a whole number >= 0" if isinstance(default, int) else "a number >= 0"


def _is_of_kind(value: float, default: float) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return 0 <= value < math.inf and (isinstance(default, float) or value == int(value))
