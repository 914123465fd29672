"""What the engine is compared with: a training loop of plain PyTorch, and generation by transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from services.node_agent.engine.training_ops import OptimizerSpec


class PlainModel:
    """The unsplit transformers model in this process."""

    def __init__(self, path: Path, optimizer: OptimizerSpec) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._spec = optimizer
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay, fused=True
        )

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def train(self, batches: Sequence[Sequence[tuple[int, ...]]]) -> None:
        """One clipped AdamW step per batch of equally long examples."""
        self._model.train()
        for batch in batches:
            token_ids = torch.tensor(batch)
            self._model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._spec.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
        """Greedy outputs of equally long prompts in one batch."""
        self._model.eval()
        token_ids = torch.tensor(prompts)
        rows = self._model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            min_new_tokens=max_tokens,
            max_new_tokens=max_tokens,
        )
        return [row[len(prompts[0]) :] for row in rows.tolist()]
