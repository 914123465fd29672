"""Mix-Random of the paper: every node serves and trains, each task goes to a node drawn at random."""

from collections.abc import Sequence

from services.scheduler.core.policies.base import Options, Placement, TrainingPlacement, turn_terms
from services.scheduler.core.policies.mixed import Mixed
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState

# Knuth's linear congruential generator (MMIX): the core has no source of randomness but its input.
_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1


class Random(Mixed):
    """Each candidate is equally likely. `seed`: the same seed and the same events give the same choices."""

    def __init__(self, options: Options) -> None:
        super().__init__("random", options, {"seed": 0})
        self._state = int(self._options["seed"]) & _MASK
        self._draw(1)  # neighbouring seeds are near in the first state only

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """Any node."""
        del now_s, live, cluster
        node = candidates[self._draw(len(candidates))]
        return Placement(node, turn_terms(node, candidates))

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """Any node."""
        del now_s, live, cluster, may_hold
        node = candidates[self._draw(len(candidates))]
        return TrainingPlacement(node, turn_terms(node, candidates))

    def _draw(self, count: int) -> int:
        """A number below `count`. From the upper bits: the lower ones of such a generator have short periods."""
        self._state = (self._state * _MULTIPLIER + _INCREMENT) & _MASK
        return (self._state >> 32) * count >> 32
