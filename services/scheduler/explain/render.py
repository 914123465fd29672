"""What the command prints."""

import math
from collections.abc import Iterable
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lemix.internal.v1 import scheduler_service_pb2 as pb
from services.scheduler.core.codec import command_to_json, event_to_json
from services.scheduler.explain.counterfactual import Comparison, Figures
from services.scheduler.explain.replay import Difference, RunReplay

_MEANINGS = {
    pb.RESPONSE_MEANING_UNSPECIFIED: "",
    pb.RESPONSE_MEANING_FIRST_TOKEN: "time to first token",
    pb.RESPONSE_MEANING_FORWARD_END: "last forward's end",
}
#: Figures of a comparison: title, field, format.
_ROWS = (
    ("SLO attainment", "slo_attainment", "{:.1%}"),
    ("tasks per held node-second", "tasks_per_held_node_s", "{:.3f}"),
    ("mean response, s", "mean_response_s", "{:.3f}"),
    ("mean time to first token, s", "mean_ttft_s", "{:.3f}"),
    ("held node-seconds", "held_node_s", "{:.1f}"),
    ("requests ended well", "num_requests_ok", "{}"),
    ("micro-batches trained", "num_microbatches_ok", "{}"),
    ("last task ended at, s", "last_end_s", "{:.1f}"),
)


def print_decision(console: Console, decision: pb.Decision) -> None:
    """One decision: what, where, why, and what came of it; times count from the task's arrival."""
    arrived_s = decision.arrival_monotonic_s
    _say(console, f"{decision.task_id}: {_work(decision)}; policy {decision.policy}, decision {decision.sequence}")
    for wait in decision.waits:
        _say(console, f"  {_after(wait.since_monotonic_s, arrived_s)}  waits: {wait.reason}")
    _say(console, f"  {_after(decision.at_monotonic_s, arrived_s)}  {_placed(decision)}")
    if decision.candidates:
        console.print(_candidates(decision))
    for text in _outcome(decision.outcome, arrived_s):
        _say(console, f"  {text}")
    if decision.HasField("predicted_response_s"):
        _say(console, f"  predicted {_MEANINGS[decision.response_meaning]} {_prediction(decision)}")


def print_answer(console: Console, task_id: str, answer: pb.ExplainTaskResponse) -> None:
    """Everything a scheduler knows about a task."""
    for decision in answer.decisions:
        print_decision(console, decision)
    for wait in answer.waits:
        _say(console, f"{task_id}: waits for {answer.now_monotonic_s - wait.since_monotonic_s:.3f} s: {wait.reason}")
    if not answer.decisions and not answer.waits:
        _say(console, f"{task_id}: known, but no decision about it is kept")


def print_newest(console: Console, decisions: Iterable[pb.Decision], now_s: float) -> None:
    """One row per decision."""
    table = _table()
    for title in ("#", "age s", "task", "work", "node", "R s", "real s", "error s", "outcome"):
        # Ids may be long; on a narrow terminal they take several lines, and no number is cut.
        is_id = title in ("task", "node")
        justify: Literal["left", "right"] = "right" if title.endswith(" s") or title == "#" else "left"
        table.add_column(title, justify=justify, no_wrap=not is_id, overflow="fold")
    for decision in decisions:
        is_predicted, is_known = decision.HasField("predicted_response_s"), decision.HasField("actual_response_s")
        predicted_s, actual_s = decision.predicted_response_s, decision.actual_response_s
        table.add_row(
            str(decision.sequence),
            f"{now_s - decision.at_monotonic_s:.1f}",
            decision.task_id,
            decision.WhichOneof("work"),
            decision.node_id or "-",
            f"{predicted_s:.3f}" if is_predicted else "-",
            f"{actual_s:.3f}" if is_known else "-",
            f"{actual_s - predicted_s:+.3f}" if is_predicted and is_known else "-",
            _fate(decision.outcome.fate),
        )
    console.print(table)


def print_replay(console: Console, path: str, run: RunReplay) -> None:
    """Whether a run's commands were the same, and the first that were not."""
    what = f"{path}: line {run.line}: policy {run.config.policy}"
    if run.difference is None:
        _say(console, f"{what}: equal: {run.num_events} events, {run.num_commands} commands")
    else:
        _say(console, f"{what}: differs (written by another version of the scheduler?)")
        _print_difference(console, path, run.difference)


def _print_difference(console: Console, path: str, difference: Difference) -> None:
    _say(console, f"{path}: line {difference.line}: first difference, at {difference.now_s} s")
    _say(console, f"  event     {event_to_json(difference.event)}")
    for title, commands in (("recorded", difference.recorded), ("replayed", difference.replayed)):
        texts = [str(command_to_json(command)) for command in commands] or ["nothing"]
        for text in texts:
            _say(console, f"  {title}  {text}")


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Recording and counterfactual side by side."""
    columns = (comparison.recorded, comparison.recorded_simulated, comparison.counterfactual)
    table = _table()
    table.add_column("", no_wrap=True)
    for figures in columns:
        table.add_column(f"{figures.policy}\n{'simulated' if figures.simulated else 'as it happened'}", justify="right")
    for title, name, form in _ROWS:
        table.add_row(title, *(_figure(figures, name, form) for figures in columns))
    console.print(table)
    _say(console, "simulated: virtual time, the recorded profiles, no delay between services.")
    _say(console, "Compare the simulated columns with each other; the first one tells how far the")
    _say(console, "simulation is from what happened.")
    if comparison.num_left_out:
        _say(console, f"left out of all columns: {comparison.num_left_out} tasks cancelled, not ended or not trained")
    if comparison.num_assumed:
        _say(console, f"{comparison.num_assumed} requests that did not end well: output taken to be of mean length")


def _figure(figures: Figures, name: str, form: str) -> str:
    value = getattr(figures, name)
    return "-" if math.isnan(value) else form.format(value)


# ------------------------------------------------------------------------- parts of a decision


def _work(decision: pb.Decision) -> str:
    if decision.HasField("request"):
        request = decision.request
        turn = f", session {request.session_id}" if request.session_id else ""
        return f"request, {request.prompt_tokens} + at most {request.max_tokens} tokens{turn}"
    microbatch = decision.microbatch
    cut = f" in {microbatch.parts} parts" if microbatch.parts > 1 else ""
    return f"micro-batch, {microbatch.batch} x {microbatch.length} tokens{cut}"


def _placed(decision: pb.Decision) -> str:
    return f"goes to {decision.node_id}" if decision.node_id else f"refused: {decision.refusal}"


def _candidates(decision: pb.Decision) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    table.add_column("node", overflow="fold")
    in_session = bool(decision.request.session_id)
    for title in ("II s", "R s", "IP s", "LC", "KV cache", *(["kept"] if in_session else []), "score"):
        table.add_column(title, justify="right", no_wrap=True)
    for terms in decision.candidates:
        is_chosen = terms.node_id == decision.node_id
        table.add_row(
            "->" if is_chosen else "",
            terms.node_id,
            f"{terms.idleness_s:.4f}",
            f"{terms.response_s:.4f}",
            f"{terms.idleness_profit_s:.4f}",
            f"{terms.length_consistency:.4f}",
            f"{terms.kv_share:.1%}",
            *([str(terms.cached_tokens)] if in_session else []),
            f"{terms.score:.4f}",
            style="bold" if is_chosen else None,
        )
    return table


def _outcome(outcome: pb.DecisionOutcome, arrived_s: float) -> Iterable[str]:
    for name, text in (("first_op", "first operation"), ("first_token", "first token")):
        if outcome.HasField(f"{name}_monotonic_s"):
            yield f"{_after(getattr(outcome, f'{name}_monotonic_s'), arrived_s)}  {text}"
    if outcome.fate != pb.DECISION_FATE_REFUSED:
        when = _after(outcome.ended_monotonic_s, arrived_s) if outcome.HasField("ended_monotonic_s") else " " * 10
        tokens = f", {outcome.output_tokens} tokens" if outcome.output_tokens else ""
        yield f"{when}  {_fate(outcome.fate)}{tokens}"


def _prediction(decision: pb.Decision) -> str:
    predicted_s, actual_s = decision.predicted_response_s, decision.actual_response_s
    if not decision.HasField("actual_response_s"):
        return f"{predicted_s:.3f} s, real: not known"
    return f"{predicted_s:.3f} s, real {actual_s:.3f} s, error {actual_s - predicted_s:+.3f} s"


def _fate(fate: pb.DecisionFate) -> str:
    return pb.DecisionFate.Name(fate).removeprefix("DECISION_FATE_").lower().replace("_", " ")


def _after(at_s: float, arrived_s: float) -> str:
    return f"{at_s - arrived_s:+8.3f} s"


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))


def _say(console: Console, text: str) -> None:
    """A line of plain text: ids may hold what rich takes for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
