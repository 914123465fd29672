"""The command line: what may be said, and what is made of a value."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from services.arguments import parser_class
from services.scheduler.core.policies import POLICIES
from services.simulator.lengths import LogNormal
from services.simulator.traffic import WORKLOADS

_PROG = "python -m services.simulator"
_Parser = parser_class("simulate")


def build_parser() -> argparse.ArgumentParser:
    """Commands and options."""
    parser = _Parser(prog=_PROG, description="Plan a cluster: the production scheduler and nodes on a virtual clock.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = _shared()
    simulate = commands.add_parser(
        "simulate", parents=[shared], help="what a cluster would do with this traffic", usage=_usage("simulate")
    )
    _add_nodes(simulate, default=2)
    _add_training(simulate)
    simulate.add_argument(
        "--compare", type=_policies, default=(), metavar="P1,P2", help="further policies, side by side"
    )
    plan = commands.add_parser("plan", help="search: how many nodes, how much training")
    questions = plan.add_subparsers(dest="question", required=True)
    nodes = questions.add_parser(
        "fewest-nodes",
        parents=[shared],
        help="the fewest nodes that keep the promise",
        usage=_usage("plan fewest-nodes"),
    )
    nodes.add_argument("--max-nodes", type=_whole(1, 1024), default=64, help="look no further (default 64)")
    nodes.add_argument("--slo-attainment", type=_share, default=0.99, help="to reach with every seed (default 0.99)")
    _add_training(nodes)
    _add_search(nodes)
    training = questions.add_parser(
        "most-training",
        parents=[shared],
        help="how much training fits before p99 breaks",
        usage=_usage("plan most-training", "--p99-ttft-ms MS "),
    )
    _add_nodes(training, default=2)
    training.add_argument("--p99-ttft-ms", type=_positive, required=True, help="p99 to keep with every seed")
    training.add_argument(
        "--p99-tpot-ms", type=_positive, help="p99 to keep per further token (default: not looked at)"
    )
    training.add_argument(
        "--tolerance", type=_share, default=0.05, help="precision of the rate, a share (default 0.05)"
    )
    _add_batch(training.add_argument_group("training"))
    _add_search(training)
    return parser


def _usage(command: str, needed: str = "") -> str:
    """What is needed; all options in their groups follow it."""
    traffic = "(--trace FILE | --workload NAME | --prompt-tokens M,S --output-tokens M,S)"
    return f"{_PROG} {command}\n  --profile FILE {needed}[options]\n  {traffic}"


def _shared() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    _add_traffic(shared.add_argument_group("traffic: a trace, or a published or described workload"))
    _add_cluster(shared.add_argument_group("cluster"))
    promise = shared.add_argument_group("promise to every request")
    promise.add_argument("--slo-ttft-ms", type=_positive, help="time to the first token")
    promise.add_argument("--slo-tpot-ms", type=_positive, help="time per further token")
    promise.add_argument(
        "--slo-units",
        type=_positive,
        default=5.0,
        help="without the two above: so many times what the mean request takes alone (default 5)",
    )
    run = shared.add_argument_group("runs")
    run.add_argument("--seed", type=_whole(0), help="one seed")
    run.add_argument("--seeds", type=_seeds, help="several, as 0,1,2 (simulate: 0; plan: 0,1,2)")
    run.add_argument("--noise", type=_not_negative, help="relative spread of durations (default: the profile's)")
    run.add_argument("--horizon-s", type=_positive, default=math.inf, help="stop then; what is unfinished is missed")
    run.add_argument("--processes", type=_whole(1, 64), default=1, help="seeds simulated at a time (default 1)")
    run.add_argument("--json", type=Path, help="write everything to this file")
    return shared


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", type=Path, help="CSV: arrival_s,prompt_tokens,output_tokens[,session_id]")
    group.add_argument("--limit", type=_whole(1), help="the trace's first so many requests")
    group.add_argument("--speed", type=_positive, help="play the trace so many times as fast (default 1)")
    group.add_argument(
        "--workload",
        choices=sorted(WORKLOADS),
        metavar="NAME",
        help=f"lengths and gaps of published traffic: {', '.join(sorted(WORKLOADS))}",
    )
    group.add_argument("--rate", type=_positive, help="requests per second (default: the workload's, if published)")
    group.add_argument("--duration-s", type=_positive, help="drawn requests arrive this long (default 300)")
    group.add_argument("--burstiness", type=_positive, help="coefficient of variation of the gaps; 1: Poisson")
    group.add_argument("--prompt-tokens", type=_lengths, metavar="MEAN,STD", help="lognormal prompts")
    group.add_argument("--output-tokens", type=_lengths, metavar="MEAN,STD", help="lognormal outputs")
    group.add_argument(
        "--max-tokens", type=_whole(1), default=0, help="limit sent with requests (default: the longest output)"
    )


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--profile", type=Path, help="latency profile of a node, as the profiler stores it")
    group.add_argument("--model", default="", help="the profile must be of this model")
    group.add_argument("--stages", type=_whole(1, 64), default=0, help="the profile must have so many stages")
    group.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        default="lemix",
        metavar="NAME",
        help=f"scheduling policy (default lemix): {', '.join(sorted(POLICIES))}",
    )
    group.add_argument(
        "--policy-option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of --policy (docs/scheduler.md)",
    )
    group.add_argument("--max-batch", type=_whole(1), default=16, help="requests decoded together (default 16)")
    group.add_argument("--max-prefill-tokens", type=_whole(1), default=2048, help="of one prefill (default 2048)")
    group.add_argument("--kv-tokens", type=_whole(1), default=65_536, help="KV cache of a node (default 65536)")
    group.add_argument(
        "--prefix-cache-tokens", type=_whole(0), default=0, help="of it kept for sessions between turns (default 0)"
    )
    group.add_argument("--max-context-tokens", type=_whole(1), default=1 << 30, help="prompt and output (default: any)")


def _add_nodes(parser: argparse.ArgumentParser, *, default: int) -> None:
    parser.add_argument("--nodes", type=_whole(1, 1024), default=default, help=f"replicas (default {default})")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--training-tokens-per-s", type=_not_negative, default=0.0, help="tokens to train (default none)"
    )
    amount.add_argument("--training-backlog", action="store_true", help="training never runs out")
    _add_batch(group)


def _add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train-batch", type=_whole(1), default=1, help="examples per micro-batch (default 1)")
    group.add_argument("--train-length", type=_whole(1), default=128, help="tokens per example (default 128)")
    group.add_argument("--train-accumulation", type=_whole(1), default=1, help="micro-batches per step (default 1)")
    group.add_argument(
        "--max-training-parts",
        type=_whole(1, 64),
        default=8,
        help="pieces a node cuts a forward or backward into at most: requests get in between (default 8, like nodes)",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--max-probes", type=_whole(1), default=24, help="values to look at (default 24)")
    group.add_argument("--deadline-s", type=_positive, default=math.inf, help="begin no probe after this long")


# ------------------------------------------------------------- values


def _number(least: float, *, above: bool, most: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value) or value < least or (above and value == least) or value > most:
            bound = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}{_and_at_most(most)}, got {text}")
        return value

    return parse


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be at least {least}{_and_at_most(most)}, got {text}")
        return value

    return parse


def _and_at_most(most: float) -> str:
    return f" and at most {most:g}" if most < math.inf else ""


_positive = _number(0.0, above=True)
_not_negative = _number(0.0, above=False)
_share = _number(0.0, above=True, most=1.0)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(_whole(0)(part) for part in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"names a seed twice: {text}")
    return seeds


def _lengths(text: str) -> LogNormal:
    mean, separator, std = text.partition(",")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be MEAN,STD, got {text!r}")
    return LogNormal.of(_positive(mean), _not_negative(std))


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"names a policy twice: {text}")
    return names


def _option(text: str) -> tuple[str, float | int | str | bool]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
