"""Training and decoding, interleaved with what they are compared with: one thread each, the same model."""

import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from bench.engine.figures import Figure, ratios
from bench.engine.node import Node
from bench.engine.peer import VllmPeer
from bench.engine.plain import PlainModel
from deploy.local.tiny_model import write_tiny_model
from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.torch.engine import load_engine
from services.node_agent.engine.training_ops import OptimizerSpec

HIDDEN, LAYERS, CONTEXT_TOKENS = 384, 8, 1024
BATCH = 8
TRAIN_TOKENS, TRAIN_STEPS = 128, 2
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64
_OPTIMIZER = OptimizerSpec(learning_rate=1e-4)

#: Tokens per second of each side, one per round.
Rates = dict[str, tuple[float, ...]]


class Speeds(NamedTuple):
    """Figures of one run, and the number of parameters of its model."""

    figures: list[Figure]
    num_parameters: int


async def measure(pairs: int, folder: Path, vllm_python: str = "") -> Speeds:
    """`pairs` times each side of every comparison, in turns; once before, uncounted. vllm_python: an interpreter that
    has vLLM, which is measured as well then."""
    torch.set_num_threads(1)
    path = folder / "model"
    write_tiny_model(path, hidden=HIDDEN, layers=LAYERS, max_context_tokens=CONTEXT_TOKENS)
    plain = PlainModel(path, _OPTIMIZER)
    async with contextlib.AsyncExitStack() as stack:
        engine = await load_engine(EngineConfig(model_path=str(path)))
        stack.push_async_callback(engine.close)
        node = Node(engine.workers)
        stack.push_async_callback(node.close)
        peer = None
        if vllm_python:
            peer = await VllmPeer.start(vllm_python, path, threads=1)
            stack.push_async_callback(peer.close)
        figures = await _compare(node, plain, peer, pairs)
    return Speeds(figures, plain.num_parameters)


async def _compare(node: Node, plain: PlainModel, peer: VllmPeer | None, pairs: int) -> list[Figure]:
    source = random.Random(0)

    def texts(count: int, length: int) -> list[tuple[int, ...]]:
        return [tuple(source.randrange(256) for _ in range(length)) for _ in range(count)]

    batches = [texts(BATCH, TRAIN_TOKENS) for _ in range(TRAIN_STEPS)]
    prompts = texts(BATCH, PROMPT_TOKENS)
    if await node.generate(prompts, OUTPUT_TOKENS) != plain.generate(prompts, OUTPUT_TOKENS):
        raise RuntimeError("the engine and transformers generate different tokens from the same weights")

    def plainly(work: Callable[[], object]) -> Callable[[], Awaitable[object]]:
        async def run() -> None:
            work()

        return run

    decoded = BATCH * OUTPUT_TOKENS
    sides: dict[str, tuple[Callable[[], Awaitable[object]], int]] = {
        "train": (lambda: node.train(batches, _OPTIMIZER), TRAIN_STEPS * BATCH * TRAIN_TOKENS),
        "plain train": (plainly(lambda: plain.train(batches)), TRAIN_STEPS * BATCH * TRAIN_TOKENS),
        "decode": (lambda: node.generate(prompts, OUTPUT_TOKENS), decoded),
        "generate": (plainly(lambda: plain.generate(prompts, OUTPUT_TOKENS)), decoded),
        "generate one": (plainly(lambda: [plain.generate([prompt], OUTPUT_TOKENS) for prompt in prompts]), decoded),
    }
    if peer is not None:
        sides["vllm"] = (lambda: peer.generate(prompts, OUTPUT_TOKENS), decoded)
    pids = [*node.pids, *([peer.pid] if peer is not None else [])]
    processes = [psutil.Process(), *(psutil.Process(pid) for pid in pids)]
    rates, cpu_rates = await _in_turns(pairs, processes, sides)
    return [*_figures(rates, cpu_rates), *(_beside(peer, rates, cpu_rates) if peer is not None else ())]


def _figures(rates: Rates, cpu_rates: Rates) -> list[Figure]:
    return [
        Figure("training", "tokens/s", rates["train"]),
        Figure("training, plain loop", "tokens/s", rates["plain train"]),
        Figure("training / plain loop", "", ratios(rates["train"], rates["plain train"]), 0.95),
        Figure("  by CPU time", "", ratios(cpu_rates["train"], cpu_rates["plain train"])),
        Figure("decode, batch 8", "tokens/s", rates["decode"]),
        Figure("transformers.generate, batch 8", "tokens/s", rates["generate"]),
        Figure("decode / generate of batch 8", "", ratios(rates["decode"], rates["generate"]), 1.0),
        Figure("  by CPU time", "", ratios(cpu_rates["decode"], cpu_rates["generate"])),
        Figure("decode / 8 generates in a row", "", ratios(rates["decode"], rates["generate one"]), 3.0),
        Figure("  by CPU time", "", ratios(cpu_rates["decode"], cpu_rates["generate one"])),
    ]


def _beside(peer: VllmPeer, rates: Rates, cpu_rates: Rates) -> list[Figure]:
    return [
        Figure(f"vLLM {peer.version} on the CPU, batch 8", "tokens/s", rates["vllm"]),
        Figure("decode / vLLM", "", ratios(rates["decode"], rates["vllm"])),
        Figure("  by CPU time", "", ratios(cpu_rates["decode"], cpu_rates["vllm"])),
    ]


async def _in_turns(
    count: int,
    processes: Sequence[psutil.Process],
    sides: dict[str, tuple[Callable[[], Awaitable[object]], int]],
) -> tuple[Rates, Rates]:
    """Tokens per second of each side, and per second of CPU time of all processes; every other round goes backwards."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_rates: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-1, count):
        for name in list(sides)[:: 1 if index % 2 else -1]:
            work, tokens = sides[name]
            begin_s, cpu_begin_s = time.monotonic(), _cpu_s(processes)
            await work()
            if index >= 0:
                rates[name].append(tokens / (time.monotonic() - begin_s))
                cpu_rates[name].append(tokens / (_cpu_s(processes) - cpu_begin_s))
    return _frozen(rates), _frozen(cpu_rates)


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(taken.user + taken.system for taken in times))


def _frozen(rates: dict[str, list[float]]) -> Rates:
    return {name: tuple(samples) for name, samples in rates.items()}
