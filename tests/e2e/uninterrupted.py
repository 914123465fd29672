"""The same training in one process that nothing interrupts."""

from lemix.v1 import types_pb2
from services.node_agent.convert import optimizer_from_proto
from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.torch.engine import load_inprocess_engine
from services.node_agent.engine.training_ops import Example, OptimizerStep, TrainBackward, TrainForward


def final_weights(model_path, examples, hyperparameters):
    """Weights by name after one micro-batch per example, in this order. hyperparameters: nothing left to defaults."""
    engine = load_inprocess_engine(EngineConfig(model_path=str(model_path), dtype="float64", kv_capacity_tokens=64))
    (worker,) = engine.workers
    stage = worker.executor
    accumulation = hyperparameters.gradient_accumulation_steps
    fields = {name: getattr(hyperparameters, name) for name in hyperparameters.__dataclass_fields__}
    optimizer = optimizer_from_proto(types_pb2.Hyperparameters(**fields), -(-len(examples) // accumulation))
    for index, example in enumerate(examples):
        tokens = Example(tuple(example.token_ids), example.num_context_tokens)
        run(stage, TrainForward(0, stage.version, f"m{index}", (tokens,), 1.0 / accumulation))
        run(stage, TrainBackward(0, f"m{index}"))
        if (index + 1) % accumulation == 0 or index + 1 == len(examples):
            run(stage, OptimizerStep(0, stage.version, "job", optimizer))
    weights = {name: part.numpy().copy() for name, part in stage.stage.weights.named(with_borrowed=False).items()}
    stage.close()
    return weights


def run(stage, op):
    """An op that must succeed."""
    result = stage.run(op)
    assert not result.error, result.error
