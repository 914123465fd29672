"""The model of the demo: a small Llama, pre-trained for a moment on documentation and kept for the next time."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.demo.config import ModelConfig
from bench.demo.corpus import Corpus
from bench.machine import usable_cores
from deploy.local.tiny_model import write_tiny_model

if TYPE_CHECKING:
    import torch

#: Raised whenever the training below changes, so that older cached models are not taken for new ones.
_RECIPE = 2
_FACTS = "demo.json"

Progress = Callable[[int, int], None]


def cached_model(
    config: ModelConfig, corpus: Corpus, *, max_context_tokens: int, cache: Path, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """Directory of the pre-trained model and facts about it (`parameters`, `heldout_loss` in nats per token).

    The directory's name is a digest of everything the weights depend on. It appears whole or not at all, so an
    interrupted run leaves nothing that a later one would take for a finished model.
    """
    key = hashlib.sha256(
        json.dumps([_RECIPE, asdict(config), max_context_tokens, corpus.digest()], sort_keys=True).encode()
    ).hexdigest()[:16]
    path = cache / f"model-{key}"
    if not (path / _FACTS).is_file():
        # Two threads that spin while they wait make a machine with other work several times slower. Read once, when
        # torch is first imported: before anything below.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".model-"))
        try:
            building = temporary / "model"
            write_tiny_model(
                building,
                hidden=config.hidden,
                layers=config.layers,
                max_context_tokens=max_context_tokens,
                seed=config.seed,
            )
            with _fast_matmul():
                facts = _pretrain(building, config, corpus, progress)
            (building / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            os.rename(building, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path, json.loads((path / _FACTS).read_text(encoding="utf-8"))


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """Matrix products in bfloat16 where the processor has it, sums in float32: a step takes three quarters the time."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _pretrain(path: Path, config: ModelConfig, corpus: Corpus, progress: Progress) -> dict[str, Any]:
    """AdamW with a one-cycle schedule over random windows of the text; writes the weights back to `path`."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    tokens = _tokens(tokenizer, corpus.docs.pretraining)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.pretrain_learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.pretrain_learning_rate, total_steps=config.pretrain_steps, pct_start=0.1
    )
    model.train()
    for step in range(config.pretrain_steps):
        starts = torch.randint(len(tokens) - config.pretrain_length, (config.pretrain_batch,), generator=generator)
        batch = torch.stack([tokens[start : start + config.pretrain_length] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1, config.pretrain_steps)
    model.eval()
    model.save_pretrained(path)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heldout_loss": {
            "docs": _loss(model, _tokens(tokenizer, corpus.docs.held_out), config.pretrain_length),
            "code": _loss(model, _tokens(tokenizer, corpus.code.held_out), config.pretrain_length),
        },
    }


def _tokens(tokenizer: Any, documents: Sequence[str]) -> "torch.Tensor":
    import torch

    return torch.tensor([token for document in documents for token in tokenizer.encode(document).ids])


def _loss(model: Any, tokens: "torch.Tensor", length: int, windows: int = 16) -> float:
    """Mean loss over evenly spread windows of the text, nats per token."""
    import torch

    step = max(1, (len(tokens) - length) // windows)
    batch = torch.stack([tokens[index * step : index * step + length] for index in range(windows)])
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)
