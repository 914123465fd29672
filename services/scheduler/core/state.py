"""What the scheduler core knows: live tasks, nodes, waiting queues. Nothing here outlives the work it is about."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.latency import PREFILL
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.costs import NodeCosts
from services.scheduler.core.estimator import Arrivals, OutputLengths, RunningMoments
from services.scheduler.core.forecast import NodeForecast
from services.scheduler.core.held_time import HeldTime
from services.scheduler.core.node_spec import NodeRole, NodeSpec
from services.scheduler.core.sessions import Sessions
from services.scheduler.core.tasks import InferenceTask, TrainingTask

if TYPE_CHECKING:
    from services.scheduler.core.node_mirror import NodeMirror


@dataclass(slots=True, eq=False)
class LiveInference:
    """A request that has not ended. `sequence` is its place in the order of acceptance."""

    task: InferenceTask
    sequence: int
    #: When its first token is due, seconds; infinite without a promise. Later for one that lets others pass.
    deadline_s: float
    node: "NodeState | None" = None
    cancelled: bool = False
    #: Reason last told in a Defer.
    defer_reason: str = ""
    #: What is predicted to be left of its prefill on its node, and whether the prefill is over.
    prefill_s: float = 0.0
    has_first_token: bool = False
    #: When it was produced, seconds.
    first_token_s: float = math.inf
    #: Tokens in its context now.
    context_tokens: int = 0
    #: Tokens of its prompt that need no prefill, as its policy expects.
    cached_tokens: int = 0
    #: What it is queued by on its node (`Assign`), and whether that lets others pass.
    queue_ttft_s: float | None = None
    is_demoted: bool = False
    #: Weights step of its prefill.
    weight_step: int = 0


@dataclass(slots=True, eq=False)
class LiveTraining:
    """A micro-batch that has not ended."""

    task: TrainingTask
    sequence: int
    node: "NodeState | None" = None
    cancelled: bool = False
    defer_reason: str = ""
    #: Pieces its operations are cut into, and the longest single one it brings to a stage of its node, seconds.
    parts: int = 1
    op_s: float = 0.0
    #: Its part of the backlog (`Cluster.backlog_s`), and whether it still counts.
    work_s: float = 0.0
    is_expected: bool = True
    #: Its forward left the first stage: under the A-PP rule the next micro-batch of its stream may follow.
    entered: bool = False
    #: Its backward left the first stage: it waits for the optimizer step of its group and blocks nothing.
    backward_done: bool = False


#: Prompt by which the speed of nodes is compared.
_TYPICAL_TOKENS = 512

LiveTask = LiveInference | LiveTraining


@dataclass(slots=True, eq=False)
class NodeState:
    """A node and what it holds. The sums are kept up to date so that a decision need not walk its tasks."""

    spec: NodeSpec
    costs: NodeCosts
    held: HeldTime
    #: Only under policies that use it.
    forecast: NodeForecast | None
    #: Follows the node's core, for policies that run it ahead.
    mirror: "NodeMirror | None" = None
    role: NodeRole = NodeRole.BOTH
    inference: dict[str, LiveInference] = field(default_factory=dict)
    training: dict[str, LiveTraining] = field(default_factory=dict)
    #: Requests whose prefill is not over, and their predicted prefill in total, seconds.
    num_prefilling: int = 0
    prefilling_s: float = 0.0
    #: The same of those of them that let others pass.
    num_demoted: int = 0
    demoted_s: float = 0.0
    #: Tokens in the contexts of all its requests, and tokens of KV cache they may come to need.
    context_tokens: int = 0
    reserved_tokens: int = 0
    #: Micro-batches whose backward is not over: what the A-PP rule counts.
    num_outstanding_training: int = 0
    #: Those of them whose forward has not left the first stage.
    num_entering_training: int = 0
    #: Longest single training operation that may be running or waiting on a stage, seconds.
    training_op_s: float = 0.0
    #: Predicted prefills of the requests sent here, seconds on a stage.
    prefills: RunningMoments = field(default_factory=RunningMoments)
    #: Lengths of the tasks sent here.
    lengths: RunningMoments = field(default_factory=RunningMoments)
    #: Requests sent here.
    arrivals: Arrivals = field(default_factory=Arrivals)
    weight_step: int = 0
    #: When the newest optimizer step in its weights was made; minus infinity: never; NaN: it has not told yet.
    trained_s: float = math.nan
    #: Isolated adapters it holds; None: it has not told yet.
    adapter_ids: frozenset[str] | None = None
    #: It is about to leave.
    is_draining: bool = False
    #: It gets no micro-batches for now.
    is_training_held: bool = False
    #: Since when training that could come here has been held back.
    held_back_since_s: float | None = None

    @property
    def node_id(self) -> str:
        """Id of the node."""
        return self.spec.node_id

    @property
    def has_room(self) -> bool:
        """Whether it may take another request."""
        return len(self.inference) < self.spec.max_inflight_inference

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt plus output it can ever run."""
        return min(self.spec.max_context_tokens, self.spec.kv_capacity_tokens)

    def weights_told(self, weight_step: int, trained_s: float | None) -> None:
        """What the node says of its weights."""
        self.weight_step = max(self.weight_step, weight_step)
        self.trained_s = -math.inf if trained_s is None else trained_s

    def stepped(self, at_s: float) -> None:
        """An optimizer step was made here."""
        self.trained_s = at_s if math.isnan(self.trained_s) else max(self.trained_s, at_s)

    def is_fresh(self, now_s: float, max_staleness_s: float) -> bool:
        """Whether its weights are known to be at most so old."""
        return now_s - self.trained_s <= max_staleness_s

    def holds(self, adapter_id: str) -> bool:
        """Whether it is known to hold this isolated adapter."""
        return self.adapter_ids is not None and adapter_id in self.adapter_ids

    def can_run(self, task: InferenceTask) -> bool:
        """Whether a request is not too long for it, and it holds the adapter that is asked for."""
        if task.adapter_id and not self.holds(task.adapter_id):
            return False
        return task.prompt_tokens + task.max_tokens <= self.max_request_tokens

    def takes_training(self, task: TrainingTask, max_inflight: int) -> bool:
        """Whether the micro-batch may leave for it now.

        A-PP: when the backward of one of its micro-batches is over, there is room for the next. S-PP: when the group
        before of the job has ended with its step.
        """
        if self.is_training_held:
            return False
        if not self.spec.synchronous_training:
            return self.num_outstanding_training < max_inflight
        of_job = sum(other.task.job_id == task.job_id for other in self.training.values())
        return of_job < task.accumulation

    def add_inference(self, now_s: float, live: LiveInference, cached_tokens: int = 0) -> None:
        """Take a request; its prefill is to come, without `cached_tokens` that are believed to be kept here."""
        self.arrivals.observe(now_s)
        task = live.task
        live.node = self
        live.cached_tokens = cached_tokens
        live.prefill_s = self.costs.node_s(PREFILL, 1, task.prompt_tokens - cached_tokens, cached_tokens)
        live.has_first_token = False
        live.context_tokens = task.prompt_tokens
        self.inference[task.task_id] = live
        self.num_prefilling += 1
        self.prefilling_s += live.prefill_s
        if live.is_demoted:
            self.num_demoted += 1
            self.demoted_s += live.prefill_s
        self.prefills.observe(live.prefill_s / self.costs.num_stages)
        self.context_tokens += live.context_tokens
        self.reserved_tokens += task.prompt_tokens + task.max_tokens

    def first_token(self, live: LiveInference, at_s: float, weight_step: int) -> None:
        """The prefill of one of its requests is over; it ran with the weights of `weight_step`."""
        if live.has_first_token:
            return
        live.weight_step = weight_step
        live.has_first_token = True
        live.first_token_s = min(live.first_token_s, at_s)
        self._leave_prefill(live)

    def prefill_left(self, live: LiveInference, stage: int) -> None:
        """The prefill of one of its requests left a stage: that part of it is no longer to come."""
        if not live.has_first_token:
            cached = live.cached_tokens
            stage_s = self.costs.stage_s(stage, PREFILL, 1, live.task.prompt_tokens - cached, cached)
            done_s = min(live.prefill_s, stage_s)
            live.prefill_s -= done_s
            self.prefilling_s -= done_s
            if live.is_demoted:
                self.demoted_s -= done_s

    def decoded(self, live: LiveInference) -> None:
        """One of its requests got one more token."""
        live.context_tokens += 1
        self.context_tokens += 1

    def remove_inference(self, live: LiveInference) -> None:
        """A request left."""
        del self.inference[live.task.task_id]
        if not live.has_first_token:
            self._leave_prefill(live)
        self.context_tokens -= live.context_tokens
        self.reserved_tokens -= live.task.prompt_tokens + live.task.max_tokens
        live.node = None

    def _leave_prefill(self, live: LiveInference) -> None:
        self.num_prefilling -= 1
        # Exactly zero when nothing waits, whatever rounding the sum has gathered.
        self.prefilling_s = self.prefilling_s - live.prefill_s if self.num_prefilling else 0.0
        if live.is_demoted:
            self.num_demoted -= 1
            self.demoted_s = self.demoted_s - live.prefill_s if self.num_demoted else 0.0

    def add_training(self, live: LiveTraining) -> None:
        """Take a micro-batch."""
        live.node = self
        live.op_s = self.costs.training_op_s(live.task.batch, live.task.length, live.task.job_id) / live.parts
        live.entered = live.backward_done = False
        self.num_entering_training += 1
        self.training[live.task.task_id] = live
        self.num_outstanding_training += 1
        self.training_op_s = max(self.training_op_s, live.op_s)

    def entered(self, live: LiveTraining) -> None:
        """The forward of one of its micro-batches left the first stage."""
        if not live.entered:
            live.entered = True
            self.num_entering_training -= 1

    def backward_ended(self, live: LiveTraining) -> None:
        """The backward of one of its micro-batches left the first stage."""
        if not live.backward_done:
            live.backward_done = True
            self.num_outstanding_training -= 1
            self.training_op_s = max((o.op_s for o in self.training.values() if not o.backward_done), default=0.0)

    def remove_training(self, live: LiveTraining) -> None:
        """A micro-batch left."""
        del self.training[live.task.task_id]
        self.entered(live)
        self.backward_ended(live)
        live.node = None


@dataclass(slots=True, eq=False)
class Cluster:
    """All state of the core that policies may read."""

    config: CoreConfig
    nodes: dict[str, NodeState] = field(default_factory=dict)
    #: Nodes that may serve, and that may train, in the order of the policy (`Policy.fastest_first`).
    serving: tuple[NodeState, ...] = ()
    training: tuple[NodeState, ...] = ()
    #: Nodes that get no work before they hold what others trained.
    held_out: tuple[NodeState, ...] = ()
    tasks: dict[str, LiveTask] = field(default_factory=dict)
    #: Tasks without a node, in order of acceptance.
    waiting_inference: dict[str, LiveInference] = field(default_factory=dict)
    waiting_training: dict[str, LiveTraining] = field(default_factory=dict)
    arrivals: Arrivals = field(default_factory=Arrivals)
    #: Running mean of prompt lengths (tokens) and of a request's own execution time (seconds; the paper's SLO unit).
    prompts: RunningMoments = field(default_factory=RunningMoments)
    forward_s: RunningMoments = field(default_factory=RunningMoments)
    outputs: OutputLengths = field(init=False)
    sessions: Sessions = field(init=False)
    #: Requests that have not ended.
    num_live_inference: int = 0
    #: Time that training not through its backward is predicted to keep the stages of one node busy, seconds.
    backlog_s: float = 0.0
    _num_untrained: int = 0

    def __post_init__(self) -> None:
        self.outputs = OutputLengths(self.config.initial_output_tokens)
        self.sessions = Sessions(self.config.max_sessions)

    @property
    def may_serve(self) -> tuple[NodeState, ...]:
        """Nodes that serve or soon will; none while none serves."""
        return self.serving + self.held_out if self.serving else ()

    def set_roles(self, roles: dict[str, NodeRole], *, fastest_first: bool) -> None:
        """Take over the roles a policy gave. A node that changes its role finishes what it holds."""
        for node_id, node in self.nodes.items():
            node.role = roles.get(node_id, NodeRole.UNUSED)
        ordered = sorted(self.nodes.values(), key=lambda node: node.node_id)
        if fastest_first:
            ordered.sort(key=lambda node: node.costs.node_s(PREFILL, 1, _TYPICAL_TOKENS) or math.inf)
        self.serving = tuple(node for node in ordered if node.role in (NodeRole.SERVE, NodeRole.BOTH))
        self.training = tuple(node for node in ordered if node.role in (NodeRole.TRAIN, NodeRole.BOTH))
        self._recount_backlog()

    def hold_training(self, node_id: str, held: bool) -> None:
        """Give a node no micro-batches, or do so again."""
        node = self.nodes.get(node_id)
        if node is not None:
            node.is_training_held = held

    def of_job(self, job_id: str) -> list[LiveTraining]:
        """Its micro-batches."""
        return [live for live in self.tasks.values() if isinstance(live, LiveTraining) and live.task.job_id == job_id]

    def expect_training(self, live: LiveTraining) -> None:
        """A micro-batch is to be trained: it counts towards the backlog until its backward is over."""
        live.work_s = 0.0
        if self.training:
            task = live.task
            live.work_s = self.training[0].costs.training_work_s(task.batch, task.length, task.job_id)
        self._num_untrained += 1
        self.backlog_s += live.work_s

    def trained(self, live: LiveTraining) -> None:
        """Its backward is over, or it left."""
        if live.is_expected:
            live.is_expected = False
            self._num_untrained -= 1
            # Exactly zero when nothing is left, whatever rounding the sum has gathered.
            self.backlog_s = max(0.0, self.backlog_s - live.work_s) if self._num_untrained else 0.0

    def forget(self, live: LiveTask) -> None:
        """The task reached its one end."""
        task_id = live.task.task_id
        del self.tasks[task_id]
        if isinstance(live, LiveInference):
            self.num_live_inference -= 1
            self.waiting_inference.pop(task_id, None)
        else:
            self.waiting_training.pop(task_id, None)
            self.trained(live)

    def _recount_backlog(self) -> None:
        """Other nodes, other costs."""
        self.backlog_s, self._num_untrained = 0.0, 0
        for live in self.tasks.values():
            if isinstance(live, LiveTraining) and live.is_expected:
                self.expect_training(live)

    def wait_again(self, tasks: Iterable[LiveTask]) -> None:
        """Put tasks of a lost node back into the queues, in order of acceptance among those that wait."""
        for live in tasks:
            live.node = None
            live.defer_reason = ""
            if isinstance(live, LiveInference):
                self.waiting_inference[live.task.task_id] = live
            else:
                self.waiting_training[live.task.task_id] = live
                if not live.is_expected:
                    live.is_expected = True
                    self.expect_training(live)
        self.waiting_inference = dict(sorted(self.waiting_inference.items(), key=lambda item: item[1].sequence))
        self.waiting_training = dict(sorted(self.waiting_training.items(), key=lambda item: item[1].sequence))

    @property
    def slo_unit_s(self) -> float:
        """Response-time unit: configured, or the mean execution time of a request alone; 0 while unknown."""
        return self.config.slo_unit_s or self.forward_s.mean
