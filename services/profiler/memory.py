"""M_peak of the stages, from the peaks of the points measured: pure.

Activations grow with the tokens of the micro-batches in flight, the KV cache with the tokens of context; weights and
everything else do not.
"""

from collections.abc import Iterable

import numpy as np
import scipy.optimize

from lemix.internal.v1 import profile_pb2

#: Fewer sizes than this do not tell a line from noise.
_FEWEST_SIZES = 3


def fit_memory(
    measurements: Iterable[profile_pb2.Measurement], stages: Iterable[profile_pb2.StageMemory]
) -> list[profile_pb2.StageMemory]:
    """`stages` (weights and KV cache) with what the peaks of training say. A stage whose peaks are unknown, or too few,
    stays as it is."""
    peaks: dict[int, dict[int, int]] = {}
    for item in measurements:
        if item.op == profile_pb2.OP_KIND_TRAIN_FORWARD and item.peak_bytes and not item.busy:
            tokens = item.batch * item.length
            known = peaks.setdefault(item.stage, {})
            known[tokens] = max(known.get(tokens, 0), item.peak_bytes)
    fitted = []
    for stage in stages:
        memory = profile_pb2.StageMemory()
        memory.CopyFrom(stage)
        known = peaks.get(stage.stage, {})
        if len(known) >= _FEWEST_SIZES:
            memory.fixed_bytes, memory.activation_bytes_per_token, memory.mape = _line(known)
        fitted.append(memory)
    return fitted


def _line(peaks: dict[int, int]) -> tuple[int, float, float]:
    """Bytes without any token, bytes per token, and the mean relative error of the line."""
    tokens = np.array(sorted(peaks), dtype=np.float64)
    measured = np.array([peaks[int(count)] for count in tokens], dtype=np.float64)
    features = np.stack([np.ones_like(tokens), tokens], axis=1)
    scale = features.max(axis=0)  # a few tokens against a billion bytes
    solution, _ = scipy.optimize.nnls(features / scale, measured / measured.max())
    fixed, slope = solution / scale * measured.max()
    predicted = features @ np.array([fixed, slope])
    return round(float(fixed)), float(slope), float(np.mean(np.abs(predicted - measured) / measured))
