"""What a finished operation tells: progress of requests, real durations, corrections of the paper's forecast."""

from services.latency import DECODE, OPTIMIZER_STEP, PREFILL, TRAIN_BACKWARD, TRAIN_FORWARD, OpKind
from services.scheduler.core.events import OpFinished
from services.scheduler.core.forecast import NodeForecast
from services.scheduler.core.state import Cluster, LiveInference, NodeState
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask

_INFERENCE_OPS = (PREFILL, DECODE)
_TRAINING_OPS = (TRAIN_FORWARD, TRAIN_BACKWARD)


def observe(op: OpFinished, node: NodeState, cluster: Cluster) -> None:
    """Bring the node's state up to date with an operation that ended on one of its stages."""
    # An op tells the version it ran with; a step leads to the next.
    stepped = op.op is OPTIMIZER_STEP and op.stage == node.costs.num_stages - 1
    node.weight_step = max(node.weight_step, op.weight_step + stepped)
    if stepped and not op.isolated:
        node.stepped(op.end_s)
    # The backwards before made the job known; one that is not any more has ended.
    if op.op is OPTIMIZER_STEP and node.costs.knows_job(op.job_id):
        node.costs.calibrate_job(op.job_id, op.stage, op.op, 1, 1, op.end_s - op.begin_s)
    if op.op in _INFERENCE_OPS:
        _calibrate_inference(op, node)
        _observe_inference(op, node, cluster)
    elif op.op in _TRAINING_OPS:
        _observe_training(op, node, cluster)


def forward_s_per_stage(task: InferenceTask, node: NodeState, cluster: Cluster) -> list[float]:
    """F of a request per stage, seconds: its prefill plus its share of the decode iterations to come.

    In the paper a request is one forward. Here it is a prefill and one iteration per further token, each shared with
    the requests that run beside it, so its own share is the iteration time divided by their number.
    """
    costs = node.costs
    iterations = cluster.outputs.expected_tokens(task) - 1.0
    if iterations <= 0.0:
        return [costs.stage_s(stage, PREFILL, 1, task.prompt_tokens) for stage in range(costs.num_stages)]
    batch = len(node.inference) or 1
    share = iterations / batch
    return [
        costs.stage_s(stage, PREFILL, 1, task.prompt_tokens)
        + share * costs.stage_s(stage, DECODE, batch, task.prompt_tokens)
        for stage in range(costs.num_stages)
    ]


def _observe_inference(op: OpFinished, node: NodeState, cluster: Cluster) -> None:
    is_last = op.stage == node.costs.num_stages - 1
    batch = len(op.task_ids)
    rest_s: dict[str, float] = {}
    is_prefill = op.op is PREFILL
    #: Prompts at their ends, then pieces of others, then decoding requests.
    num_firsts = batch - op.partials - op.decodes if is_prefill else 0
    first_decode = batch - op.decodes if is_prefill else 0
    for index, task_id in enumerate(op.task_ids):
        live = node.inference.get(task_id)
        if live is None:
            continue
        if index >= first_decode:
            if is_last:
                node.decoded(live)
        elif index < num_firsts and is_last and op.first_token:
            node.first_token(live, op.end_s, op.weight_step)
        elif index < num_firsts:
            node.prefill_left(live, op.stage)
        if node.forecast is not None:
            rest_s[task_id] = _rest_s(op, batch, live, node, cluster)
    if node.forecast is None or not rest_s:
        return
    if op.op is PREFILL:
        node.forecast.forward_ran(op.stage, op.begin_s, op.end_s, rest_s)
    else:
        node.forecast.decode_ran(op.stage, op.end_s, rest_s)


def _rest_s(op: OpFinished, batch: int, live: LiveInference, node: NodeState, cluster: Cluster) -> float:
    """Expected share of a stage that a running request still needs: iterations to come, each shared by the batch."""
    task = live.task
    if task.max_tokens <= 1:
        return 0.0
    produced = 1 + live.context_tokens - task.prompt_tokens
    # Who has outlived the expectation is taken to need one more token.
    iterations = max(1.0, cluster.outputs.expected_tokens(task) - produced)
    if op.op is DECODE:
        return iterations * (op.end_s - op.begin_s) / batch
    running = max(1, len(node.inference) - node.num_prefilling)
    return iterations * node.costs.stage_s(op.stage, DECODE, running, live.context_tokens) / running


def _calibrate_inference(op: OpFinished, node: NodeState) -> None:
    batch = len(op.task_ids) - op.decodes
    if not batch:
        return
    if op.op is PREFILL:
        length, cached = op.num_tokens / batch, op.context_tokens / batch
    else:
        length, cached = op.context_tokens / batch, 0.0
    own_s = op.end_s - op.begin_s
    beside = bool(node.training)
    if op.decodes:
        # Who took how much of it cannot be told: both were right or wrong alike.
        contexts = op.decode_context_tokens / op.decodes
        prefill_s = node.costs.stage_s(op.stage, PREFILL, batch, length, cached)
        decode_s = node.costs.stage_s(op.stage, DECODE, op.decodes, contexts)
        mixed_s = node.costs.mixed_s(op.stage, prefill_s, decode_s)
        share = own_s / mixed_s if mixed_s > 0.0 else 0.0
        node.costs.calibrate(op.stage, DECODE, op.decodes, contexts, share * decode_s, beside=beside)
        own_s = share * prefill_s
    node.costs.calibrate(op.stage, op.op, batch, length, own_s, cached, beside=beside)


def _observe_training(op: OpFinished, node: NodeState, cluster: Cluster) -> None:
    for task_id in op.task_ids:
        live = node.training.get(task_id)
        if live is None:
            continue
        task = live.task
        is_last_part = op.part + 1 == op.parts
        if op.stage == 0 and is_last_part:
            if op.op is TRAIN_FORWARD:
                node.entered(live)
            else:
                node.backward_ended(live)
                cluster.trained(live)
        whole_s = (op.end_s - op.begin_s) * op.parts
        if not task.trains_adapter:
            if not live.cancelled:
                node.costs.trains(task.job_id)
            node.costs.calibrate(op.stage, op.op, task.batch, task.length, whole_s, beside=bool(node.inference))
        elif not live.cancelled:
            node.costs.calibrate_job(task.job_id, op.stage, op.op, task.batch, task.length, whole_s)
        if node.forecast is None or not is_last_part:
            continue
        if op.op is TRAIN_FORWARD:
            node.forecast.forward_ran(op.stage, op.begin_s, op.end_s, {task_id: 0.0})
        else:
            node.forecast.backward_ran(op.stage, task_id, op.begin_s, op.end_s)


def training_s_per_stage(task: TrainingTask, node: NodeState, op: OpKind) -> list[float]:
    """F or B of a micro-batch per stage, seconds."""
    costs = node.costs
    return [costs.stage_s(stage, op, task.batch, task.length, job_id=task.job_id) for stage in range(costs.num_stages)]


def commit(now_s: float, task: Task, node: NodeState, forecast: NodeForecast, cluster: Cluster) -> None:
    """Enter a task into the forecast of the node it goes to."""
    if isinstance(task, InferenceTask):
        forward_s = forward_s_per_stage(task, node, cluster)
        cluster.forward_s.observe(sum(forward_s))
        forecast.commit(task.task_id, now_s, forecast.compute_idleness(now_s, forward_s))
    else:
        path = forecast.compute_idleness(now_s, training_s_per_stage(task, node, TRAIN_FORWARD))
        backward_s = training_s_per_stage(task, node, TRAIN_BACKWARD)
        forecast.commit(task.task_id, now_s, path, backward_s)
