"""One training run: replicas in turn, held together by one policy."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.convergence.config import Run, StudyConfig
from bench.demo.corpus import Corpus, load_corpus, pieces

if TYPE_CHECKING:
    from bench.convergence.replica import Replica


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids: pieces to train on, in order, and windows that are never trained on."""

    training: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]


def load_text(model: Path, config: StudyConfig, seed: int, corpus: Corpus | None = None) -> Text:
    """Source code of the standard library: what the model, pre-trained on documentation, has not seen.

    The seed decides the order of the pieces. Raises ValueError when there are too few.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    code = (corpus or load_corpus()).code
    texts = pieces(code.training, config.piece_tokens, seed)
    if len(texts) < config.updates:
        raise ValueError(f"the text holds {len(texts)} pieces for {config.updates} updates")
    tokens = tokenizer.encode("".join(code.held_out)).ids
    step = (len(tokens) - config.piece_tokens) // config.held_out_windows
    starts = [index * step for index in range(config.held_out_windows)]
    return Text(
        training=[tokenizer.encode(item).ids for item in texts[: config.updates]],
        held_out=[tokens[start : start + config.piece_tokens] for start in starts],
    )


def play(run: Run, config: StudyConfig, model: Path, text: Text) -> dict[str, Any]:
    """The whole run. Points are measured before the round that is due: replicas as they serve at their oldest.

    Returns `points` (updates and Measurement), `rounds`, `training_loss` of the last tenth, `seconds`.
    """
    import torch

    from bench.convergence.evaluate import Evaluator
    from bench.convergence.replica import Replica
    from services.node_agent.engine.training_ops import OptimizerSpec

    began_s = time.monotonic()
    evaluator = Evaluator(model, torch.tensor(text.held_out))
    replicas = [Replica(model, max_context_tokens=config.piece_tokens) for _ in range(run.replicas)]
    optimizer = OptimizerSpec(learning_rate=config.learning_rate)
    points: list[dict[str, float]] = []
    losses: list[float] = []
    rounds = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            for update, piece in enumerate(text.training, start=1):
                losses.append(replicas[(update - 1) % run.num_trainers].train(piece, optimizer))
                if update % config.evaluate_every == 0:
                    found = evaluator.measure([replica.snapshot("evaluation") for replica in replicas])
                    points.append({"updates": update, **asdict(found)})
                if is_round(run, update):
                    rounds += 1
                    _synchronise(run, replicas, f"round-{rounds}", Path(folder))
    finally:
        for replica in replicas:
            replica.close()
    last = losses[-max(1, len(losses) // 10) :]
    seconds = time.monotonic() - began_s
    return {"points": points, "rounds": rounds, "training_loss": sum(last) / len(last), "seconds": seconds}


def is_round(run: Run, update: int) -> bool:
    """Whether every trainer has made another `every_steps` steps with this update."""
    return run.policy.every_steps > 0 and update % (run.policy.every_steps * run.num_trainers) == 0


def _synchronise(run: Run, replicas: Sequence["Replica"], name: str, folder: Path) -> None:
    from bench.convergence.replica import average, copy

    if run.policy.sync == "average":
        average(replicas, name, folder)
    else:
        copy(replicas[0], replicas[1:], name)


def play_in_process(run: Run, config: StudyConfig, model: Path) -> dict[str, Any]:
    """`play` in a worker process, on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return play(run, config, model, load_text(model, config, run.seed))
