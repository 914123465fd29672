"""A live run played again in the simulator: the same arrivals, lengths, policy, settings and nodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from bench.fidelity.delays import Delays
from bench.fidelity.trace import Step, Trace, trace_of
from services.scheduler.core.commands import Command
from services.scheduler.core.events import Event
from services.scheduler.core.tasks import TrainingTask
from services.simulator.cluster import Simulation
from services.simulator.convert import virtual_node
from services.simulator.types import Microbatch, Request, SimulationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What the simulator is to know of the engine beyond the profile. noise, cut_overhead: see `SimulationConfig`."""

    noise: float | None = 0.0
    cut_overhead: float = 0.0
    seed: int = 0


def simulate(live: Trace, end_s: float, delays: Delays, truth: Truth) -> Trace:
    """The run until `end_s` of the live clock, with its times on that clock.

    A request arrives when the live scheduler heard of it, as long as it took the gateway. Raises ValueError for a run
    without nodes.
    """
    if not live.nodes:
        raise ValueError("no node joined")
    began_s = live.began_s
    config = SimulationConfig(
        core=live.config,
        seed=truth.seed,
        noise=truth.noise,
        cut_overhead=truth.cut_overhead,
        dispatch_s=delays.dispatch_s,
        handover_s=delays.handover_s,
        report_s=delays.report_s,
        outcome_s=delays.outcome_s,
        horizon_s=end_s - began_s,
    )
    nodes = [virtual_node(spec, joins_s=live.joined_s[node_id] - began_s) for node_id, spec in live.nodes.items()]
    steps: list[Step] = []

    def on_step(now_s: float, event: Event, commands: Sequence[Command]) -> None:
        steps.append((now_s, event, commands))

    Simulation(config, nodes, _requests(live, began_s), _backlog(live, began_s), on_step).run()
    return _on_clock_of(live, trace_of(live.config, steps))


def _requests(live: Trace, began_s: float) -> list[Request]:
    return [
        Request(
            task.task_id,
            request.arrived_s - began_s,
            task.prompt_tokens,
            request.output_tokens or task.max_tokens,
            task.max_tokens,
            # As it was told: what the cluster promises by default is in the scheduler's settings.
            task.slo,
            task.session_id,
            fixed_output=task.fixed_output,
        )
        for request in live.requests.values()
        for task in (request.task,)
    ]


def _backlog(live: Trace, began_s: float) -> Iterator[Microbatch] | None:
    """The micro-batches in the order they were offered, and like the last of them without end; None: no training."""
    offered = sorted(live.training.values(), key=lambda task: live.offered_s.get(task.task_id, task.arrival_s))
    if not offered:
        return None
    return _endless(offered, min(task.arrival_s for task in offered) - began_s)


def _endless(offered: Sequence[TrainingTask], arrival_s: float) -> Iterator[Microbatch]:
    for index in count():
        task = offered[index % len(offered)]
        yield Microbatch(f"m{index}", arrival_s, task.job_id, task.batch, task.length, task.accumulation)


def _on_clock_of(live: Trace, simulated: Trace) -> Trace:
    """The simulated times moved to the live clock; a request arrived at the gateway as long before as it did live."""
    by_s = live.began_s
    for task_id, request in simulated.requests.items():
        request.task = live.requests[task_id].task
        request.arrived_s += by_s
        request.assigned_s = _later(request.assigned_s, by_s)
        request.first_begin_s = _later(request.first_begin_s, by_s)
        request.first_token_s = _later(request.first_token_s, by_s)
        request.last_token_s = _later(request.last_token_s, by_s)
        request.told_end_s = _later(request.told_end_s, by_s)
    simulated.ops = [op._replace(begin_s=op.begin_s + by_s, end_s=op.end_s + by_s) for op in simulated.ops]
    simulated.told_s = [told_s + by_s for told_s in simulated.told_s]
    simulated.assignments = [(at_s + by_s, node_id, task_id) for at_s, node_id, task_id in simulated.assignments]
    return simulated


def _later(at_s: float | None, by_s: float) -> float | None:
    return None if at_s is None else at_s + by_s
