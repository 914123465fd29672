"""Which versions the weights of each node contain, as far as this scheduler has seen.

So it knows who may go on from whose checkpoint without losing anything. What it has not seen counts as training of the
node's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from lemix.internal.v1 import scheduler_service_pb2 as pb

#: Name of a synchronisation that hands out a checkpoint.
CHECKPOINT_PREFIX = "checkpoint/"

K = TypeVar("K")
V = TypeVar("V")

#: The model directory: every version descends from it.
_ORIGIN = ""
#: Nodes, checkpoints and rounds remembered, and versions per node.
_MAX_KEPT = 256


@dataclass(slots=True)
class _Weights:
    incarnation: int
    address: str
    #: The version taken over last as a whole, and whether the node has trained since.
    base: str
    trained: bool
    #: Whether it has trained since it was last asked to copy or change its weights.
    trained_since_asked: bool = False
    contains: dict[str, None] = field(default_factory=dict)
    #: Rounds in which others could take from it.
    given: dict[str, None] = field(default_factory=dict)
    #: Checkpoint it was asked to restore.
    restoring: str = ""

    def took(self, version: str, contains: Iterable[str]) -> None:
        self.base, self.trained = version, self.trained_since_asked
        self.contains = dict.fromkeys([*contains, version])


class Lineage:
    """Told of every message to and from the nodes that is about weights."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Weights] = {}
        #: What checkpoints contain.
        self._checkpoints: dict[str, frozenset[str]] = {}
        #: Command of the newest rounds, by round and node.
        self._rounds: dict[tuple[str, str], pb.ApplyWeights] = {}
        #: What the snapshots of rounds contain, by round and node.
        self._snapshots: dict[tuple[str, str], frozenset[str]] = {}

    # ------------------------------------------------------------- told

    def joined(self, hello: pb.NodeHello) -> None:
        """A node is here. One that has started anew goes on from its newest checkpoint."""
        known = self._nodes.pop(hello.node_id, None)
        if known is not None and known.incarnation == hello.incarnation:
            known.address = hello.address
            self._nodes[hello.node_id] = known
            return
        is_changed = hello.weights_changed or bool(hello.adapters)
        weights = _Weights(hello.incarnation, hello.address, _ORIGIN, trained=is_changed)
        if is_changed and known is not None and hello.checkpoints:
            newest = hello.checkpoints[0].checkpoint_id
            weights.took(newest, self._checkpoints.get(newest, ()))
        self._nodes[hello.node_id] = weights
        _trim(self._nodes)

    def trained(self, node_id: str) -> None:
        """A node made an optimizer step."""
        weights = self._nodes.get(node_id)
        if weights is not None:
            weights.trained = weights.trained_since_asked = True

    def sent(self, node_id: str, message: pb.NodeSessionResponse) -> None:
        """A node is asked for something."""
        weights = self._nodes.get(node_id)
        if weights is None:
            return
        if message.HasField("take_snapshot"):
            weights.trained_since_asked = False
        elif message.HasField("apply_weights"):
            command = message.apply_weights
            self._rounds[command.sync_id, node_id] = command
            _trim(self._rounds)
            if command.mode == pb.SYNC_MODE_REPLACE:
                weights.trained_since_asked = False
                for source in self._sources(command):
                    source.contains[command.sync_id] = None
        elif message.checkpoint.HasField("restore"):
            weights.trained_since_asked, weights.restoring = False, message.checkpoint.restore

    def finished(self, node_id: str, finished: pb.SyncFinished) -> None:
        """A node has copied or changed its weights, or could not."""
        weights, sync_id = self._nodes.get(node_id), finished.sync_id
        if weights is None or finished.HasField("error"):
            return
        if finished.snapshot_only:
            weights.given[sync_id] = None
            self._snapshots[sync_id, node_id] = frozenset(weights.contains)
            _trim(weights.given)
            _trim(self._snapshots)
            return
        command = self._rounds.get((sync_id, node_id))
        if command is None or command.adapters:
            weights.trained = True  # not followed
        elif sync_id.startswith(CHECKPOINT_PREFIX):
            checkpoint_id = sync_id.removeprefix(CHECKPOINT_PREFIX)
            weights.took(checkpoint_id, self._checkpoints.get(checkpoint_id, ()))
        elif command.mode == pb.SYNC_MODE_REPLACE:
            names = [name for name, known in self._nodes.items() if known.address in command.source_addresses]
            weights.took(sync_id, self._snapshots.get((sync_id, names[0]), ()) if names else ())
        else:
            weights.took(sync_id, weights.contains)

    def saved(self, node_id: str, report: pb.CheckpointReport) -> None:
        """A node saved a checkpoint, perhaps after it restored one, or could not."""
        weights = self._nodes.get(node_id)
        if weights is None or report.path:
            return
        if report.HasField("error"):
            # It may have changed its weights and not have saved them.
            weights.trained |= bool(weights.restoring)
            weights.restoring = ""
            return
        saved = report.checkpoint
        if weights.restoring and saved.reason == "rollback":
            weights.took(weights.restoring, self._checkpoints.get(weights.restoring, ()))
            weights.restoring = ""
        weights.contains[saved.checkpoint_id] = None
        _trim(weights.contains)
        self._checkpoints[saved.checkpoint_id] = frozenset(weights.contains)
        _trim(self._checkpoints)

    # ------------------------------------------------------------- asked

    def obstacle(self, node_id: str, checkpoint_id: str) -> str:
        """Why a node would lose something by going on from a checkpoint; empty: it would not."""
        weights = self._nodes.get(node_id)
        if weights is None or weights.trained:
            return f"{node_id} has trained itself"
        if weights.base not in self._content(checkpoint_id):
            return f"{node_id} holds weights that checkpoint {checkpoint_id} does not go on from"
        return ""

    def taker(self, node_id: str, checkpoint_id: str) -> str:
        """A node that took over what a lost node trained after its checkpoint; empty: none."""
        lost = self._nodes.get(node_id)
        if lost is None:
            return ""
        newer = {*lost.contains, *lost.given} - self._content(checkpoint_id)
        takers = (name for name, weights in self._nodes.items() if name != node_id and weights.base in newer)
        return next(takers, "")

    def _content(self, checkpoint_id: str) -> frozenset[str]:
        return self._checkpoints.get(checkpoint_id, frozenset()) | {_ORIGIN, checkpoint_id}

    def _sources(self, command: pb.ApplyWeights) -> list[_Weights]:
        return [weights for weights in self._nodes.values() if weights.address in command.source_addresses]


def _trim(kept: dict[K, V]) -> None:
    while len(kept) > _MAX_KEPT:
        del kept[next(iter(kept))]
