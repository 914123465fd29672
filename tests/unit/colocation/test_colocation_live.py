"""What a live run is told and how its figures are taken."""

from dataclasses import replace

import pytest

from bench.colocation.config import ColocationConfig
from bench.colocation.live_run import core_settings, figures, node_settings, planned
from bench.colocation.measure import solo_work_s
from bench.colocation.scenario import as_emulated, profile, rows, run_of
from bench.live.requests import RequestRecord, Status
from bench.live.run import Sent
from services.latency import OpKind
from services.node_agent.config import NodeAgentSettings
from services.node_agent.core.types import NodeCoreConfig
from services.node_agent.core_config import core_config
from services.node_agent.engine.base import ModelInfo
from services.scheduler.config import CoreSettings
from services.scheduler.core.events import OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.tasks import SloTarget, TrainingTask
from services.scheduler.explain.log_file import Step

CONFIG = ColocationConfig(seconds=10.0)
RUN = as_emulated(run_of(CONFIG, "lemix", 5.0, 0, trains=True))
SCALE = 4.0
INFO = ModelInfo(
    architecture="Llama", num_layers=1, vocab_size=1, max_context_tokens=1, num_parameters=0, eos_token_ids=()
)


def test_every_second_is_scaled():
    slo = SloTarget(1.6, 0.2)
    core = CoreSettings(**core_settings(RUN, slo, SCALE))
    assert core.policy_options == {"dwell_s": 4.0, "backlog_s": 48.0}
    assert (core.default_slo.ttft_s, core.default_slo.tpot_s) == (1.6, 0.2)
    assert core.max_hold_back_s == SCALE * CoreSettings().max_hold_back_s
    of_node = core_config(NodeAgentSettings(**node_settings(CONFIG.limits, SCALE)), INFO)
    once = NodeCoreConfig(num_stages=1)
    assert of_node.max_training_wait_s == SCALE * once.max_training_wait_s
    assert of_node.group_timeout_s == SCALE * once.group_timeout_s
    assert of_node.max_demotion_s == SCALE * once.max_demotion_s


def test_nodes_have_the_limits_of_the_simulated_ones():
    node = NodeAgentSettings(**node_settings(CONFIG.limits, SCALE))
    assert (node.max_batch, node.weight_handling, node.max_training_parts) == (32, "stash", 16)
    assert node.max_queued_training >= node.max_inflight_training


def test_the_same_requests_are_sent_slower():
    found = planned(RUN, SCALE)
    drawn = rows(RUN)
    assert [(len(item.prompt), item.max_tokens) for item in found] == [
        (row.prompt_tokens, row.output_tokens) for row in drawn
    ]
    assert found[-1].at_s == pytest.approx(SCALE * drawn[-1].arrival_s)
    assert all(row.prompt_tokens + row.output_tokens <= 4096 for row in drawn)


def _record(name, first_s, last_s, tokens, staleness_s=None, status=Status.OK):
    return RequestRecord(name, "", 0.0, 0.0, status, first_s, last_s, tokens, staleness_s=staleness_s)


def _op(kind, begin_s, end_s):
    return OpFinished("node-0", 0, kind, begin_s, end_s, (), 1)


def test_figures_are_told_as_at_scale_one():
    slo = SloTarget(SCALE * 0.4, SCALE * 0.05)
    sent = Sent(
        100.0,
        60.0,
        [
            _record("kept", 1.0, 1.0 + 9 * 0.16, 10, staleness_s=2.0),
            _record("late", 1.7, 2.0, 10, staleness_s=2.0),
            _record("slow", 1.0, 1.0 + 9 * 0.24, 10, staleness_s=2.0),
            _record("refused", None, None, 0, status=Status.REJECTED),
        ],
        0,
        {},
    )
    events = [
        (100.0, TaskArrived(TrainingTask("m0", 100.0, "job", 1, 512, 8))),
        (100.0, TaskArrived(TrainingTask("m1", 100.0, "job", 1, 512, 8))),
        (104.0, _op(OpKind.PREFILL, 96.0, 104.0)),
        (112.0, _op(OpKind.TRAIN_FORWARD, 104.0, 112.0)),
        (120.0, TaskEnded("m0", "node-0", True)),
        (120.0, TaskEnded("kept", "node-0", True, 10)),
        (160.0, TaskEnded("m1", "node-0", True)),
    ]
    steps = [Step(index, now_s, event, []) for index, (now_s, event) in enumerate(events)]
    latency = profile(CONFIG.profile).latency
    found = figures(replace(RUN, profiles=RUN.profiles[:1]), sent, steps, {"node-0": latency}, slo, SCALE)
    assert (found.num_requests, found.num_kept, found.num_rejected) == (4, 1, 1)
    assert (found.serving_s, found.training_s) == (1.0, 2.0)
    # The second micro-batch ended after the last arrival.
    assert found.trained_tokens == 512
    assert found.trained_work_s == pytest.approx(solo_work_s(latency, CONFIG.training))
    assert found.ttft_p50_s == pytest.approx(0.25)
    assert found.staleness_p50_s == pytest.approx(0.5)
    assert found.stage_s == 2 * 10.0
