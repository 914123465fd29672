"""What a planner should know before believing the figures: one line per caution, none of them an error."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence

from services.latency import OpKind
from services.simulator.figures import Figures
from services.simulator.profile_file import Grid, Profile
from services.simulator.scenario import Scenario
from services.simulator.trace_file import TraceRow

#: Training keeps up when this share of what was asked is trained: micro-batches are on their way when a run ends.
KEPT_UP = 0.95


def of_input(
    options: argparse.Namespace, scenario: Scenario, profile: Profile, asked: Sequence[TraceRow]
) -> Iterator[str]:
    """About the first seed's requests, `asked` with outputs that are not cut, and what the cluster makes of them."""
    yield from _cut_outputs(options, asked)
    yield from _refused(options, scenario, asked)
    yield from _never_seen(options, asked)
    yield from _sessions(options, asked)
    if profile.measured:
        yield from _extrapolated(options, profile, scenario, asked)


def of_runs(policy: str, runs: Sequence[Figures], training_tokens_per_s: float) -> Iterator[str]:
    """About a policy's runs with several seeds: more was asked than the cluster can do."""
    overloaded = [figures.queue for figures in runs if figures.queue.grows]
    if overloaded:
        queue, seeds = overloaded[0], f" with {len(overloaded)} of {len(runs)} seeds" if len(runs) > 1 else ""
        yield (
            f"{policy} is overloaded{seeds}: in the second half of the traffic {queue.arrived_per_s:.2f} requests/s "
            f"arrive and {queue.answered_per_s:.2f}/s are answered; {queue.waiting_half_way} wait when it begins, "
            f"{queue.waiting_at_end} when it ends"
        )
    trained = min((figures.trained_tokens_per_s for figures in runs), default=math.inf)
    if training_tokens_per_s < math.inf and trained < KEPT_UP * training_tokens_per_s:
        asked = f"{training_tokens_per_s:g} tokens/s"
        yield f"{policy} does not keep up with training: {asked} asked for, {trained:.1f} trained"


def _named(options: argparse.Namespace, row: TraceRow, column: str) -> str:
    """A number of tokens, and where it stands."""
    tokens = getattr(row, f"{column}_tokens")
    if options.trace is None:
        return f"drawn traffic: {column} of {tokens} tokens"
    return f"{options.trace}: line {row.line}: column '{column}_tokens': {tokens}"


def _cut_outputs(options: argparse.Namespace, asked: Sequence[TraceRow]) -> Iterator[str]:
    longer = [row for row in asked if options.max_tokens and row.output_tokens > options.max_tokens]
    if longer:
        cut = f"is cut to --max-tokens {options.max_tokens}, as {len(longer)} of {len(asked)} outputs are"
        yield f"{_named(options, longer[0], 'output')} {cut}"


def _refused(options: argparse.Namespace, scenario: Scenario, asked: Sequence[TraceRow]) -> Iterator[str]:
    node = scenario.node
    limit = min(node.max_context_tokens, node.kv_capacity_tokens)
    most = options.max_tokens or max(row.output_tokens for row in asked)
    refused = [row for row in asked if row.prompt_tokens + most > limit]
    if refused:
        option = "--kv-tokens" if limit == node.kv_capacity_tokens else "--max-context-tokens"
        yield (
            f"{_named(options, refused[0], 'prompt')} and an output of at most {most} exceed {option} {limit}: "
            f"{len(refused)} of {len(asked)} requests are refused"
        )


def _never_seen(options: argparse.Namespace, asked: Sequence[TraceRow]) -> Iterator[str]:
    late = sum(row.arrival_s > options.horizon_s for row in asked)
    if late:
        count = f"{late} of {len(asked)} requests"
        yield f"--horizon-s {options.horizon_s:g} ends before {count} arrive; they count as missed"


def _sessions(options: argparse.Namespace, asked: Sequence[TraceRow]) -> Iterator[str]:
    has_turns = any(row.session_id for row in asked)
    if options.prefix_cache_tokens and not has_turns:
        where = f"{options.trace}: column 'session_id' names none" if options.trace is not None else "drawn traffic"
        yield f"--prefix-cache-tokens keeps nothing without sessions: {where}"
    if not options.prefix_cache_tokens and has_turns:
        yield f"{options.trace}: column 'session_id': nothing is kept between turns without --prefix-cache-tokens"
    history: dict[str, tuple[int, TraceRow]] = {}
    shorter = []
    for row in asked:
        said, before = history.get(row.session_id, (0, row))
        if row.session_id and row.prompt_tokens < said:
            shorter.append((row, said, before))
        history[row.session_id] = row.prompt_tokens + row.output_tokens, row
    if shorter:
        row, said, before = shorter[0]
        yield (
            f"{_named(options, row, 'prompt')} is less than the {said} tokens of "
            f"session {row.session_id!r} up to line {before.line}; a prompt holds the turns before it "
            f"({len(shorter)} of {len(asked)} rows)"
        )


def _extrapolated(
    options: argparse.Namespace, profile: Profile, scenario: Scenario, asked: Sequence[TraceRow]
) -> Iterator[str]:
    """Values above the measured ones; below, what an operation costs at all prevails, and that is measured."""
    cut = [min(row.output_tokens, options.max_tokens or row.output_tokens) for row in asked]
    context = max(row.prompt_tokens + output for row, output in zip(asked, cut, strict=True))
    training = scenario.training
    wanted = [
        ("prefill", OpKind.PREFILL, {"length": max(row.prompt_tokens for row in asked)}),
        ("decode", OpKind.DECODE, {"batch": options.max_batch, "context": context}),
    ]
    if training.tokens_per_s:
        size = {"batch": training.batch, "length": training.length, "tokens": training.batch * training.length}
        wanted.append(("training", OpKind.TRAIN_FORWARD, size))
    for name, kind, values in wanted:
        grid = profile.measured.get(kind)
        beyond = _beyond(grid, values) if grid is not None else ""
        if beyond:
            yield f"{options.profile}: {name} is extrapolated: {beyond}"


def _beyond(grid: Grid, values: Mapping[str, int]) -> str:
    measured = {"batch": grid.batch, "length": grid.length, "context": grid.length, "tokens": grid.tokens}
    return "; ".join(
        f"{name} measured {measured[name][0]} to {measured[name][1]}, wanted {value}"
        for name, value in values.items()
        if value > measured[name][1]
    )
