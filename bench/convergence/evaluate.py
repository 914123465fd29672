"""What replicas are worth and how far apart they are: on held-out text, from their snapshots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of all replicas at one time.

    loss: mean held-out loss, nats per token: what a request sees that may go to any of them. best, worst: of one of
    them. distance: mean of ||w - mean|| / ||mean|| over the replicas. kl: mean Kullback-Leibler divergence between the
    predictions of two of them, over ordered pairs, nats per token. Both are 0 for a single one.
    """

    loss: float
    best: float
    worst: float
    distance: float
    kl: float


class Evaluator:
    """Measures weights files of one model on windows of text, int64 (windows, length)."""

    def __init__(self, model: Path, windows: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        self._model.eval()
        self._windows = windows

    def measure(self, files: Sequence[Path]) -> Measurement:
        """All replicas, from the files of their weights. Raises ValueError for a file of another model."""
        weights = [load_file(path) for path in files]
        predictions = [self._log_probabilities(named) for named in weights]
        losses = [self._loss(predicted) for predicted in predictions]
        return Measurement(
            loss=sum(losses) / len(losses),
            best=min(losses),
            worst=max(losses),
            distance=distance(weights),
            kl=divergence(predictions),
        )

    @torch.no_grad()
    def _log_probabilities(self, named: dict[str, Tensor]) -> Tensor:
        """Of the next token, (windows, length - 1, vocabulary)."""
        missing, unexpected = self._model.load_state_dict(named, strict=False)
        # A tied output layer is stored once, as the embedding.
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"the weights are not the model's: {unexpected} unexpected, {missing} missing")
        logits = self._model(input_ids=self._windows).logits[:, :-1]
        return functional.log_softmax(logits.float(), dim=-1)

    def _loss(self, predicted: Tensor) -> float:
        return float(-predicted.gather(-1, self._windows[:, 1:, None]).mean())


def distance(weights: Sequence[dict[str, Tensor]]) -> float:
    """Mean of ||w - mean|| / ||mean|| over the replicas, all tensors together."""
    if len(weights) == 1:
        return 0.0
    apart = [0.0] * len(weights)
    size = 0.0
    for name in weights[0]:
        stacked = torch.stack([named[name].double() for named in weights])
        mean = stacked.mean(dim=0)
        size += float(mean.square().sum())
        for index, value in enumerate((stacked - mean).square().flatten(1).sum(dim=1).tolist()):
            apart[index] += value
    return float(sum((value / size) ** 0.5 for value in apart) / len(weights))


def divergence(predictions: Sequence[Tensor]) -> float:
    """Mean KL(p || q) over ordered pairs of replicas and all positions, nats; predictions are log-probabilities."""
    pairs = [(one, other) for one in predictions for other in predictions if one is not other]
    if not pairs:
        return 0.0
    values = [float((one.exp() * (one - other)).sum(dim=-1).mean()) for one, other in pairs]
    return sum(values) / len(values)
