"""Grid of points to measure on a node: pure."""

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from services.profiler.config import GridSettings, OpGrid


def grid_points(grid: GridSettings, *, max_batch: int, max_context_tokens: int) -> list[node_pb2.GridPoint]:
    """Points within the node's limits, each once, in a fixed order. A limit of 0 is no limit.

    A value beyond a limit is lowered to it, so that the largest possible operation is measured.
    """
    max_prompt_tokens = max_context_tokens - 1  # serving leaves room for the token that is made
    pairs = {
        profile_pb2.OP_KIND_PREFILL: _within(grid.prefill, max_batch, max_prompt_tokens, grid.max_point_tokens),
        # A decode step reads the context but computes one token per sequence: no bound on batch * length.
        profile_pb2.OP_KIND_DECODE: _within(grid.decode, max_batch, max_prompt_tokens, 0),
        profile_pb2.OP_KIND_TRAIN_FORWARD: _within(grid.train, 0, max_context_tokens, grid.max_point_tokens),
    }
    if grid.whole_model_ops:
        pairs[profile_pb2.OP_KIND_OPTIMIZER_STEP] = [(1, 1)]
        pairs[profile_pb2.OP_KIND_WEIGHT_SYNC] = [(1, 1)]
    return [
        node_pb2.GridPoint(op=op, batch=batch, length=length)
        for op, values in pairs.items()
        for batch, length in values
    ]


def _within(grid: OpGrid, max_batch: int, max_length: int, max_tokens: int) -> list[tuple[int, int]]:
    batches = sorted({min(batch, max_batch) if max_batch > 0 else batch for batch in grid.batches})
    lengths = sorted({min(length, max_length) if max_length > 0 else length for length in grid.lengths})
    return [
        (batch, length) for batch in batches for length in lengths if max_tokens <= 0 or batch * length <= max_tokens
    ]
