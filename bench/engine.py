"""Speed of the torch engine: `python -m bench.engine`.

One stage worker process with one thread serves and trains a random Llama of about three million parameters. Prints
tokens per second of decode, prefill and training, and what the runtime adds to an op: the round trip of an empty op,
and for real ops the wall time seen by the agent less the time between begin and end in the worker. Writes the numbers
to out/bench/engine.json.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deploy.local.tiny_model import write_tiny_model
from services.node_agent.engine.base import (
    Decode,
    DecodeSequence,
    EngineConfig,
    Example,
    Forget,
    OptimizerSpec,
    OptimizerStep,
    Prefill,
    PrefillSequence,
    Sampling,
    StageOp,
    StageResult,
    StageWorker,
    TrainBackward,
    TrainForward,
)
from services.node_agent.engine.torch.engine import load_engine

_OUTPUT = Path("out/bench/engine.json")
_BATCH = 8
_LENGTH = 128


class Meter:
    """Runs ops on one worker and keeps, per kind, compute time and what the runtime added, seconds."""

    def __init__(self, worker: StageWorker) -> None:
        self._worker = worker
        self.compute_s: dict[str, list[float]] = {}
        self.overhead_s: dict[str, list[float]] = {}

    async def run(self, kind: str, op: StageOp) -> StageResult:
        """One op; raises RuntimeError when it failed."""
        begin = time.monotonic()
        result = await self._worker.run(op)
        wall = time.monotonic() - begin
        if result.error:
            raise RuntimeError(result.error)
        compute = result.end_s - result.begin_s
        self.compute_s.setdefault(kind, []).append(compute)
        self.overhead_s.setdefault(kind, []).append(wall - compute)
        return result

    def forget(self) -> None:
        """Drop what was measured so far (warm-up)."""
        self.compute_s.clear()
        self.overhead_s.clear()


async def measure(repetitions: int) -> dict[str, object]:
    """Numbers of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_tiny_model(path, hidden=192, layers=7, max_context_tokens=1024)
        engine = await load_engine(EngineConfig(model_path=str(path)))
        try:
            meter = Meter(engine.workers[0])
            version = await _run_all(meter, 2, 0)
            meter.forget()
            await _run_all(meter, repetitions, version)
            parameters = engine.info.num_parameters
        finally:
            await engine.close()
    return _summary(meter, parameters)


async def _run_all(meter: Meter, repetitions: int, version: int) -> int:
    """All kinds of op `repetitions` times; the weights version reached."""
    prompts = [tuple((7 * row + place) % 256 for place in range(_LENGTH)) for row in range(_BATCH)]
    examples = tuple(Example(prompt) for prompt in prompts)
    sampling = Sampling(ignore_eos=True)
    for repetition in range(repetitions):
        for _ in range(20):
            await meter.run("empty", Forget(0, ()))
        names = [f"{repetition}/{row}" for row in range(_BATCH)]
        sequences = [PrefillSequence(n, p, sampling, 64) for n, p in zip(names, prompts, strict=True)]
        result = await meter.run("prefill", Prefill(0, version, tuple(sequences)))
        for step in range(20):
            rows = tuple(DecodeSequence(t.request_id, t.token_id, _LENGTH + step) for t in result.tokens)
            result = await meter.run("decode", Decode(0, version, rows))
        await meter.run("forget", Forget(0, tuple(names)))
        await meter.run("train_forward", TrainForward(0, version, "m", examples))
        await meter.run("train_backward", TrainBackward(0, "m"))
        await meter.run("optimizer_step", OptimizerStep(0, version, "job", OptimizerSpec()))
        version += 1
    return version


def _summary(meter: Meter, parameters: int) -> dict[str, object]:
    compute = {kind: statistics.median(values) for kind, values in meter.compute_s.items()}
    train_s = compute["train_forward"] + compute["train_backward"] + compute["optimizer_step"]

    def per_kind(values: dict[str, list[float]], pick: Callable[[list[float]], float]) -> dict[str, float]:
        return {kind: round(1e6 * pick(samples), 1) for kind, samples in values.items()}

    return {
        "num_parameters": parameters,
        "batch": _BATCH,
        "length_tokens": _LENGTH,
        "prefill_tokens_per_s": round(_BATCH * _LENGTH / compute["prefill"]),
        "decode_tokens_per_s": round(_BATCH / compute["decode"]),
        "train_tokens_per_s": round(_BATCH * _LENGTH / train_s),
        "op_median_us": per_kind(meter.compute_s, statistics.median),
        "runtime_overhead_median_us": per_kind(meter.overhead_s, statistics.median),
        "runtime_overhead_p90_us": per_kind(meter.overhead_s, lambda s: sorted(s)[int(0.9 * (len(s) - 1))]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    arguments = parser.parse_args()
    summary = asyncio.run(measure(arguments.repetitions))
    text = json.dumps(summary, indent=2)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
