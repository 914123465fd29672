"""Replicas of a model in this process, trained and synchronised by the node agent's own code."""

from collections.abc import Sequence
from pathlib import Path

from services.node_agent.combine import Replica as Weights
from services.node_agent.combine import write_mean
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.engine import InProcessStageWorker, load_inprocess_engine
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, Snapshot
from services.node_agent.tensor_file import TensorFile

_JOB = "job"


class Replica:
    """A model on one stage, with an optimizer of its own."""

    def __init__(self, model: Path, *, max_context_tokens: int) -> None:
        # A few tokens of KV cache: nothing is served here.
        config = EngineConfig(model_path=str(model), kv_capacity_tokens=256, max_context_tokens=max_context_tokens)
        (worker,) = load_inprocess_engine(config).workers
        assert isinstance(worker, InProcessStageWorker)
        self._stage = worker.executor

    def close(self) -> None:
        """Remove its snapshots."""
        self._stage.close()

    def train(self, token_ids: Sequence[int], optimizer: OptimizerSpec) -> float:
        """One optimizer step on one example; its loss before the step, nats per token."""
        result = self._run(TrainForward(0, self._stage.version, "m", (Example(tuple(token_ids)),)))
        self._run(TrainBackward(0, "m"))
        self._run(OptimizerStep(0, self._stage.version, _JOB, optimizer))
        assert result.loss is not None
        return result.loss

    def snapshot(self, name: str) -> Path:
        """Its weights in a file of full-model names, kept until the next but one."""
        return Path(self._run(Snapshot(0, self._stage.version, name)).weights_path)

    def load(self, name: str, path: Path, mode: str) -> None:
        """Change the weights as a synchronisation does; see LoadWeights."""
        self._run(LoadWeights(0, self._stage.version, name, str(path), mode))

    def _run(self, op: StageOp) -> StageResult:
        result = self._stage.run(op)
        if result.error:
            raise RuntimeError(result.error)
        return result


def average(replicas: Sequence[Replica], name: str, folder: Path) -> None:
    """A round of averaging: every replica takes a snapshot, then moves by the mean less its own."""
    files = [TensorFile.open(replica.snapshot(name)) for replica in replicas]
    mean = folder / "mean.safetensors"
    try:
        write_mean(mean, [Weights(str(index), [file]) for index, file in enumerate(files)])
    finally:
        for file in files:
            file.close()
    for replica in replicas:
        replica.load(name, mean, "average")


def copy(source: Replica, targets: Sequence[Replica], name: str) -> None:
    """A round of copying: the targets take over the source's weights."""
    path = source.snapshot(name)
    for target in targets:
        target.load(name, path, "replace")
