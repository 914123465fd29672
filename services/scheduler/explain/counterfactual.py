"""What another policy would have done with what arrived: the recorded tasks and nodes in the simulator.

Commands alone cannot tell: under another policy nodes would have been busy with other things. So the recorded
arrivals, output lengths, profiles and node lives are played on the production cores in virtual time, under the recorded
policy too, because only simulations compare with each other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask
from services.scheduler.explain.recording import Recording
from services.scheduler.explain.types import Decision, Fate
from services.simulator.cluster import Simulation
from services.simulator.convert import virtual_node
from services.simulator.metrics import held_node_s
from services.simulator.types import (
    Microbatch,
    Request,
    SimulationConfig,
    SimulationResult,
    Stay,
    TaskRecord,
    VirtualNode,
    Work,
)

_OPEN = (Fate.UNFINISHED, Fate.NODE_LOST)


@dataclass(frozen=True, slots=True)
class Figures:
    """One column of the comparison; times in seconds, shares 0-1, NaN without any task to tell from.

    policy: with its options. slo_attainment: share of the requests that ended well within their TTFT and TPOT promise;
    one without a promise has to end well. tasks_per_held_node_s: a node is held from an assignment until it was idle
    for `hold_s`. Response is from arrival to end, over requests that ended well.
    """

    policy: str
    simulated: bool
    num_requests: int
    num_requests_ok: int
    num_microbatches_ok: int
    slo_attainment: float
    tasks_per_held_node_s: float
    held_node_s: float
    mean_response_s: float
    mean_ttft_s: float
    last_end_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The recording as it happened, its policy in the simulator, and the other policy in the simulator.

    num_left_out: tasks that were cancelled or had not ended in the recording, and micro-batches that were not trained.
    num_assumed: requests that failed or were refused, whose output is taken to be as long as the mean.
    """

    recorded: Figures
    recorded_simulated: Figures
    counterfactual: Figures
    num_left_out: int
    num_assumed: int


def compare(recording: Recording, policy: str, options: Mapping[str, float | int | str | bool]) -> Comparison:
    """Play a recording under a policy; with the recorded policy `options` add to the recorded ones.

    Raises ValueError for an unknown policy or option.
    """
    config = replace(recording.config, sync_every_steps=recording.sync_every_steps)
    kept = config.policy_options if policy == config.policy else {}
    other = replace(config, policy=policy, policy_options={**kept, **options})
    work, num_assumed = _work(recording)
    return Comparison(
        recorded=_figures(_as_result(recording, work), config, simulated=False),
        recorded_simulated=_figures(_simulate(recording, config, work), config, simulated=True),
        counterfactual=_figures(_simulate(recording, other, work), other, simulated=True),
        num_left_out=len(recording.tasks) - len(work),
        num_assumed=num_assumed,
    )


def _simulate(recording: Recording, config: CoreConfig, work: list[Work]) -> SimulationResult:
    return Simulation(SimulationConfig(core=config), _nodes(recording), work).run()


def _nodes(recording: Recording) -> list[VirtualNode]:
    began_s = recording.began_s
    return [
        virtual_node(life.spec, joins_s=life.joined_s - began_s, lost_s=life.lost_s - began_s)
        for life in recording.nodes
        if life.lost_s > life.joined_s
    ]


# ------------------------------------------------------------------------- what arrived


def _work(recording: Recording) -> tuple[list[Work], int]:
    """The tasks to play, and how many of them have an output length nobody saw."""
    lengths = [
        decision.outcome.output_tokens
        for task_id in recording.tasks
        if (decision := recording.final(task_id)) is not None
        and decision.outcome.fate is Fate.OK
        and decision.outcome.output_tokens
    ]
    mean_tokens = max(1, round(sum(lengths) / len(lengths))) if lengths else recording.config.initial_output_tokens
    began_s = recording.began_s
    job_began_s: dict[str, float] = {}
    work: list[Work] = []
    num_assumed = 0
    for task_id, task in recording.tasks.items():
        if isinstance(task, TrainingTask):
            job_began_s.setdefault(task.job_id, task.arrival_s)
        decision = recording.final(task_id)
        if decision is None or not _is_played(recording, decision):
            continue
        if isinstance(task, TrainingTask):
            # A job is there from its start; how fast it was offered was the recorded policy's doing.
            arrival_s = max(0.0, job_began_s[task.job_id] - began_s)
            work.append(Microbatch(task_id, arrival_s, task.job_id, task.batch, task.length, recording.accumulation))
            continue
        is_known = decision.outcome.fate is Fate.OK and decision.outcome.output_tokens > 0
        num_assumed += not is_known
        assumed_tokens = task.max_tokens if task.fixed_output else mean_tokens
        work.append(_request(recording, task, decision.outcome.output_tokens if is_known else assumed_tokens))
    return work, num_assumed


def _is_played(recording: Recording, decision: Decision) -> bool:
    fate = decision.outcome.fate
    if isinstance(decision.task, TrainingTask) or fate is Fate.OK:
        return fate is Fate.OK
    return fate not in _OPEN and decision.task.task_id not in recording.cancelled


def _request(recording: Recording, task: InferenceTask, output_tokens: int) -> Request:
    default = recording.config.default_slo
    slo = SloTarget(
        default.ttft_s if task.slo.ttft_s is None else task.slo.ttft_s,
        default.tpot_s if task.slo.tpot_s is None else task.slo.tpot_s,
    )
    return Request(
        task.task_id,
        max(0.0, task.arrival_s - recording.began_s),
        task.prompt_tokens,
        min(output_tokens, max(1, task.max_tokens)),
        task.max_tokens,
        slo,
        task.session_id,
        fixed_output=task.fixed_output,
    )


# ------------------------------------------------------------------------- what came of it


def _as_result(recording: Recording, work: list[Work]) -> SimulationResult:
    """The recording in the form of a simulation's result, so that one definition measures both."""
    began_s = recording.began_s
    records: dict[str, TaskRecord] = {}
    stays: list[Stay] = []
    for item in work:
        records[item.task_id] = record = TaskRecord(item)
        for decision in recording.decisions[item.task_id]:
            if decision.node_id:
                record.node_id, record.assigned_s = decision.node_id, decision.at_s - began_s
                record.assignments += 1
                stay_end_s = _since(began_s, decision.outcome.ended_s)
                end_s = math.inf if stay_end_s is None else stay_end_s
                stays.append(Stay(decision.node_id, item.task_id, decision.at_s - began_s, end_s))
        final = recording.final(item.task_id)
        if final is not None:
            record.first_token_s = _since(began_s, final.outcome.first_token_s)
            record.ended_s = _since(began_s, final.outcome.ended_s)
            good = "trained" if isinstance(item, Microbatch) else "stop"
            record.outcome = good if final.outcome.fate is Fate.OK else final.outcome.fate.value
    ended_s = recording.ended_s - began_s
    return SimulationResult(tasks=records, stages={}, decisions=[], stays=stays, ended_s=ended_s, num_ops=0, ops=[])


def _since(began_s: float, at_s: float | None) -> float | None:
    return None if at_s is None else at_s - began_s


def _figures(result: SimulationResult, config: CoreConfig, *, simulated: bool) -> Figures:
    requests = list(result.requests())
    good = [record for record in requests if record.ok]
    trained = sum(record.ok for record in result.microbatches())
    held_s = held_node_s(result, config.hold_s)
    ends_s = [record.ended_s for record in result.tasks.values() if record.ok and record.ended_s is not None]
    return Figures(
        policy=" ".join([config.policy, *(f"{name}={value}" for name, value in config.policy_options.items())]),
        simulated=simulated,
        num_requests=len(requests),
        num_requests_ok=len(good),
        num_microbatches_ok=trained,
        slo_attainment=sum(_kept(record) for record in good) / len(requests) if requests else math.nan,
        tasks_per_held_node_s=(len(good) + trained) / held_s if held_s > 0.0 else math.nan,
        held_node_s=held_s,
        mean_response_s=_mean(good, lambda record: record.ended_s),
        mean_ttft_s=_mean(good, lambda record: record.first_token_s),
        last_end_s=max(ends_s, default=math.nan),
    )


def _kept(record: TaskRecord) -> bool:
    """Whether a request that ended well kept its promise."""
    work = record.work
    if not isinstance(work, Request) or record.ended_s is None:
        return False
    slo, first_s = work.slo, record.first_token_s
    if first_s is None:
        return slo.ttft_s is None and slo.tpot_s is None
    if slo.ttft_s is not None and first_s - work.arrival_s > slo.ttft_s:
        return False
    further = work.output_tokens - 1
    return slo.tpot_s is None or further < 1 or record.ended_s - first_s <= slo.tpot_s * further


def _mean(records: list[TaskRecord], time_s: Callable[[TaskRecord], float | None]) -> float:
    """Mean time since the arrival."""
    since_s = [at_s - record.work.arrival_s for record in records if (at_s := time_s(record)) is not None]
    return sum(since_s) / len(since_s) if since_s else math.nan
