"""A cluster, its traffic and its training as a planner describes them, and what a simulation says about them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

from services.latency import NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import create
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import Simulation
from services.simulator.figures import Figures, evaluate
from services.simulator.trace_file import TraceRow
from services.simulator.traffic import Traffic
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode

MOST_NODES = 1024
#: A day: an operation that takes longer is a mistake in the profile or in a length.
_LONGEST_OP_S = 86_400.0
#: Kinds of operation that training needs a latency for; a profile without the optimizer step takes it as free.
_TRAINING_KINDS = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)


class ScenarioError(ValueError):
    """A cluster that cannot do what it is asked to; the message is one line that names the field.

    about: "profile" or "trace" when what is wrong stands there, so that who read it can name the file.
    """

    def __init__(self, reason: str, about: str = "") -> None:
        super().__init__(f"{about}: {reason}" if about else reason)
        self.reason = reason
        self.about = about


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Every node of the cluster. Limits are those of a node agent's settings."""

    latency: NodeLatency
    max_batch: int = 16
    max_prefill_tokens: int = 2048
    kv_capacity_tokens: int = 65_536
    max_context_tokens: int = 1 << 30
    max_inflight_inference: int = 64
    prefix_cache_tokens: int = 0
    max_training_parts: int = 8

    def named(self, node_id: str) -> VirtualNode:
        """One of them."""
        core = NodeCoreConfig(
            num_stages=self.latency.num_stages,
            max_batch=self.max_batch,
            max_prefill_tokens=self.max_prefill_tokens,
            kv_capacity_tokens=self.kv_capacity_tokens,
            prefix_cache_tokens=self.prefix_cache_tokens,
        )
        return VirtualNode(
            node_id=node_id,
            latency=self.latency,
            core=core,
            max_inflight_inference=self.max_inflight_inference,
            max_context_tokens=self.max_context_tokens,
            max_training_parts=self.max_training_parts,
        )


@dataclass(frozen=True, slots=True)
class Training:
    """Micro-batches of `batch` x `length` tokens, so many tokens per second; infinite: a backlog that never drains."""

    tokens_per_s: float = 0.0
    batch: int = 1
    length: int = 128
    accumulation: int = 1

    def stream(self) -> Iterator[Microbatch]:
        """Micro-batches by rising arrival time; without end, or none."""
        if not self.tokens_per_s:
            return
        gap_s = self.batch * self.length / self.tokens_per_s
        for index in count():
            yield Microbatch(f"m{index}", index * gap_s, "training", self.batch, self.length, self.accumulation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything but the seed. `max_tokens` 0: every request may produce as much as the longest of them does."""

    num_nodes: int
    node: Node
    traffic: Traffic
    slo: SloTarget
    training: Training = Training()
    policy: str = "lemix"
    policy_options: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    #: None: every operation varies as the profile says.
    noise: float | None = 0.0
    max_tokens: int = 0
    horizon_s: float = math.inf
    hold_s: float = 10.0

    def check(self, rows: Sequence[TraceRow]) -> None:
        """Whether this cluster can do anything at all with these requests. Raises ScenarioError."""
        if not 1 <= self.num_nodes <= MOST_NODES:
            raise ScenarioError(f"nodes: must be 1 to {MOST_NODES}, got {self.num_nodes}")
        try:
            create(self.policy, dict(self.policy_options))
            self.node.named("node")
        except ValueError as error:
            raise ScenarioError(str(error)) from error
        _check_sizes(self.node, rows, self.work(rows))
        _check_serving(self.node.latency, rows)
        if self.training.tokens_per_s:
            _check_training(self.training, self.node)

    def work(self, rows: Sequence[TraceRow]) -> list[Request]:
        """The requests. A turn of a session arrives when the trace says, but not before the end of the turn before."""
        most = self.max_tokens or max(row.output_tokens for row in rows)
        newest: dict[str, str] = {}
        requests = []
        for index, row in enumerate(rows):
            task_id, session_id = f"r{index}", row.session_id
            max_tokens = max(most, row.output_tokens)
            request = Request(task_id, row.arrival_s, row.prompt_tokens, row.output_tokens, max_tokens, self.slo)
            if session_id:
                request = replace(request, session_id=session_id, after=newest.get(session_id, ""))
                newest[session_id] = task_id
            requests.append(request)
        return requests


def simulate(scenario: Scenario, seed: int) -> Figures:
    """One run. Raises ScenarioError for a cluster that makes no sense, ValueError for traffic that does not."""
    rows = scenario.traffic.draw(seed)
    scenario.check(rows)
    core = CoreConfig(
        policy=scenario.policy,
        policy_options=dict(scenario.policy_options),
        default_slo=scenario.slo,
        hold_s=scenario.hold_s,
    )
    config = SimulationConfig(core=core, seed=seed, noise=scenario.noise, horizon_s=scenario.horizon_s)
    width = len(str(scenario.num_nodes - 1))
    nodes = [scenario.node.named(f"node-{index:0{width}}") for index in range(scenario.num_nodes)]
    result = Simulation(config, nodes, scenario.work(rows), scenario.training.stream()).run()
    return evaluate(result, slo=scenario.slo, hold_s=scenario.hold_s)


class Demand(NamedTuple):
    """Nodes that the work keeps busy, if decode batches are full and nothing has to wait: the least there can be."""

    serving_nodes: float
    training_nodes: float


def demand(scenario: Scenario, rows: Sequence[TraceRow]) -> Demand:
    """What is asked of the cluster. Training without end asks for all there is: infinite."""
    latency, batch = scenario.node.latency, scenario.node.max_batch
    serving_s = [0.0] * latency.num_stages
    for row in rows:
        context = row.prompt_tokens + row.output_tokens / 2
        for stage in range(latency.num_stages):
            decode_s = latency.op_s(stage, OpKind.DECODE, batch, context) / batch
            prefill_s = latency.op_s(stage, OpKind.PREFILL, 1, row.prompt_tokens)
            serving_s[stage] += prefill_s + (row.output_tokens - 1) * decode_s
    training = scenario.training
    step_s = max(
        sum(latency.op_s(stage, kind, training.batch, training.length) for kind in _TRAINING_KINDS)
        + latency.op_s(stage, OpKind.OPTIMIZER_STEP, 1, 1) / training.accumulation
        for stage in range(latency.num_stages)
    )
    span_s = rows[-1].arrival_s
    return Demand(
        max(serving_s) / span_s if span_s > 0.0 else math.inf,
        training.tokens_per_s / (training.batch * training.length) * step_s if training.tokens_per_s else 0.0,
    )


def slo_of_units(units: float, latency: NodeLatency, rows: Sequence[TraceRow]) -> SloTarget:
    """`units` times what the mean request takes alone on an idle node, for the first token and any further one."""
    prompt = sum(row.prompt_tokens for row in rows) / len(rows)
    output = sum(row.output_tokens for row in rows) / len(rows)
    tpot_s = units * latency.node_s(OpKind.DECODE, 1, prompt + output / 2)
    return SloTarget(units * latency.node_s(OpKind.PREFILL, 1, prompt), tpot_s or None)


def _check_sizes(node: Node, rows: Sequence[TraceRow], work: Sequence[Request]) -> None:
    limits = {"kv_tokens": node.kv_capacity_tokens, "max_context_tokens": node.max_context_tokens}
    name = min(limits, key=lambda name: limits[name])
    row, least = min(zip(rows, work, strict=True), key=lambda pair: pair[1].prompt_tokens + pair[1].max_tokens)
    if least.prompt_tokens + least.max_tokens > limits[name]:
        tokens = f"a prompt of {least.prompt_tokens} and an output of at most {least.max_tokens}"
        reason = f"no request fits into {name} {limits[name]}, not even {tokens}"
        raise ScenarioError(f"line {row.line}: {reason}", "trace") if row.line else ScenarioError(reason)


def _check_serving(latency: NodeLatency, rows: Sequence[TraceRow]) -> None:
    longest = max(rows, key=lambda row: row.prompt_tokens).prompt_tokens
    kinds = [OpKind.PREFILL, *([OpKind.DECODE] if any(row.output_tokens > 1 for row in rows) else [])]
    for stage in range(latency.num_stages):
        for kind in kinds:
            seconds = latency.op_s(stage, kind, 1, longest)
            if seconds <= 0.0:
                raise ScenarioError(f"no time for {kind.value} on stage {stage}", "profile")
            if seconds > _LONGEST_OP_S:
                what = f"{kind.value} of {longest} tokens on stage {stage}"
                raise ScenarioError(f"{what} takes {seconds:g} s, which is no time of an operation", "profile")


def _check_training(training: Training, node: Node) -> None:
    if not training.tokens_per_s > 0.0:
        raise ScenarioError(f"training_tokens_per_s: must not be negative, got {training.tokens_per_s:g}")
    for name in ("batch", "length", "accumulation"):
        if getattr(training, name) < 1:
            raise ScenarioError(f"train_{name}: must be at least 1, got {getattr(training, name)}")
    if training.length > node.max_context_tokens:
        limit = node.max_context_tokens
        raise ScenarioError(f"train_length: {training.length} tokens do not fit into max_context_tokens {limit}")
    for stage in range(node.latency.num_stages):
        for kind in _TRAINING_KINDS:
            if node.latency.op_s(stage, kind, training.batch, training.length) <= 0.0:
                raise ScenarioError(f"no time for {kind.value} on stage {stage}; it cannot train", "profile")
