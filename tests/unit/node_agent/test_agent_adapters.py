"""Which adapters a node holds, who may use them, and when they go."""

import pytest

from lemix.errors import ErrorCode, LemixError
from services.node_agent.adapters import NodeAdapters
from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec
from services.node_agent.tasks import MicrobatchTask, RequestTask

ISOLATED = AdapterSpec("job-1", isolated=True)
ONLINE = AdapterSpec("job-2")


def request(adapter_id: str) -> RequestTask:
    return RequestTask("r", 0.0, (1,), Sampling(), 4, adapter_id=adapter_id)


def microbatch(spec: AdapterSpec | None) -> MicrobatchTask:
    return MicrobatchTask("m", "job-1", 0, (), OptimizerSpec(), adapter=spec)


def code_of(adapters: NodeAdapters, task: RequestTask | MicrobatchTask) -> ErrorCode:
    with pytest.raises(LemixError) as caught:
        adapters.admit(task)
    return caught.value.code


def never(job_id: str) -> bool:
    del job_id
    return False


def test_an_adapter_serves_from_the_moment_that_every_stage_has_it() -> None:
    adapters, changes = NodeAdapters(2), []
    adapters.on_change = lambda: changes.append(set(adapters.held))
    adapters.admit(request(""))
    adapters.admit(microbatch(None))
    assert code_of(adapters, request("job-1")) is ErrorCode.MODEL_NOT_FOUND
    adapters.expect(ISOLATED)
    assert code_of(adapters, request("job-1")) is ErrorCode.MODEL_NOT_FOUND
    adapters.made(ISOLATED)
    adapters.made(ISOLATED)
    adapters.admit(request("job-1"))
    assert changes == [{"job-1"}]


def test_there_is_a_bound_and_no_two_of_one_name() -> None:
    adapters = NodeAdapters(1)
    adapters.expect(ISOLATED)
    adapters.admit(microbatch(ISOLATED))
    assert code_of(adapters, microbatch(ONLINE)) is ErrorCode.RESOURCE_EXHAUSTED
    assert code_of(adapters, microbatch(AdapterSpec("job-1", rank=3, isolated=True))) is ErrorCode.CONFLICT


def test_an_unwanted_one_goes_when_nothing_uses_it() -> None:
    adapters = NodeAdapters(1)
    adapters.expect(ISOLATED)
    adapters.made(ISOLATED)
    live = [request("job-1"), request(""), microbatch(None)]
    assert adapters.unwanted("job-1", live) == ["r"]
    assert code_of(adapters, request("job-1")) is ErrorCode.MODEL_NOT_FOUND
    assert code_of(adapters, microbatch(ISOLATED)) is ErrorCode.CANCELLED
    assert adapters.take_unused(live, (), never) == []
    assert adapters.take_unused(live[1:], ["job-1"], never) == []
    assert adapters.take_unused(live[1:], (), lambda job_id: job_id == "job-1") == []
    assert adapters.take_unused(live[1:], (), never) == ["job-1"]
    assert adapters.take_unused([], (), never) == []
    adapters.admit(microbatch(ONLINE))  # there is room again
    # Work that is still on its way here does not bring it back.
    assert code_of(adapters, microbatch(ISOLATED)) is ErrorCode.CANCELLED
    adapters.made(ISOLATED)
    assert dict(adapters.held) == {}


def test_steps_are_told_apart() -> None:
    adapters = NodeAdapters(2)
    for spec in (ISOLATED, ONLINE):
        adapters.expect(spec)
    assert (adapters.is_isolated("job-1"), adapters.is_isolated("job-2"), adapters.is_isolated("full")) == (1, 0, 0)
    adapters.stepped("job-1", 5.0)
    assert not adapters.weights_changed
    adapters.stepped("full", 6.0)
    assert adapters.weights_changed
    assert adapters.newest_step("", None) is None
    assert adapters.newest_step("", 3.0) == 3.0
    # Below an isolated adapter are the weights; what other adapters add to the served model is not.
    assert adapters.newest_step("job-1", 9.0) == 6.0
    adapters.stepped("job-1", 7.0)
    assert adapters.newest_step("job-1", 9.0) == 7.0


def restore(adapters: NodeAdapters, *specs: AdapterSpec, task: MicrobatchTask | None = None) -> None:
    adapters.adopt(specs, [task] if task else [], weights_changed=False, trained_unix_s={"job-2": 2.0})


def test_a_checkpoint_brings_back_when_its_adapters_were_trained() -> None:
    adapters = NodeAdapters(2)
    adapters.expect(ISOLATED)
    adapters.stepped("job-1", 5.0)
    restore(adapters, ONLINE)
    assert dict(adapters.trained_unix_s) == {"job-2": 2.0}
    adapters.expect(AdapterSpec("job-3"))  # what no stage had leaves its place
    assert code_of(adapters, microbatch(ISOLATED)) is ErrorCode.RESOURCE_EXHAUSTED


def test_a_checkpoint_takes_back_adapters_of_the_served_model_alone() -> None:
    adapters = NodeAdapters(3)
    for spec in (ISOLATED, ONLINE):
        adapters.expect(spec)
        adapters.made(spec)
        adapters.stepped(spec.adapter_id, 5.0)
    restore(adapters)
    assert dict(adapters.held) == {"job-1": ISOLATED}
    assert dict(adapters.trained_unix_s) == {"job-1": 5.0, "job-2": 2.0}
    adapters.admit(request("job-1"))
    # A micro-batch that waits makes its own anew, and its steps are not those of the weights.
    restore(adapters, task=microbatch(ONLINE))
    adapters.stepped("job-2", 6.0)
    assert not adapters.weights_changed


def test_a_deletion_under_way_outlives_a_restore() -> None:
    adapters = NodeAdapters(2)
    adapters.expect(ISOLATED)
    adapters.made(ISOLATED)
    assert adapters.unwanted("job-1", []) == []
    restore(adapters, ONLINE)
    assert adapters.take_unused([], (), never) == ["job-1"]
    restore(adapters, ISOLATED, ONLINE)
    assert adapters.take_unused([], (), never) == ["job-1"]


def test_only_one_that_nobody_will_make_leaves_its_place() -> None:
    adapters = NodeAdapters(1)
    adapters.expect(ISOLATED)
    adapters.not_made("job-1", [microbatch(ISOLATED)])
    assert adapters.take_unused([], (), never) == []
    adapters.not_made("job-1", [])
    adapters.expect(ISOLATED)  # its next micro-batch is here before it was freed
    assert adapters.take_unused([], (), never) == []
    adapters.made(ISOLATED)
    adapters.not_made("job-1", [])
    assert adapters.take_unused([], (), never) == []
    assert dict(adapters.held) == {"job-1": ISOLATED}


def test_a_job_that_goes_on_after_its_adapter_was_freed_makes_it_anew() -> None:
    """Micro-batches of the attempt before are still refused."""
    adapters = NodeAdapters(1)
    later = microbatch(ISOLATED)
    later.attempt = 1
    adapters.unwanted("job-1", [])
    assert code_of(adapters, microbatch(ISOLATED)) is ErrorCode.CANCELLED
    adapters.admit(later)
    adapters.made(ISOLATED)
    adapters.admit(request("job-1"))
    assert adapters.unwanted("job-1", [later]) == ["m"]
    assert code_of(adapters, later) is ErrorCode.CANCELLED
    assert adapters.take_unused([], (), never) == ["job-1"]
    assert code_of(adapters, later) is ErrorCode.CANCELLED
    later.attempt = 2
    adapters.admit(later)


def test_a_job_that_goes_on_waits_for_its_old_adapter_to_go() -> None:
    """What is left of it must not be trained on."""
    adapters = NodeAdapters(1)
    adapters.admit(microbatch(ISOLATED))
    adapters.made(ISOLATED)
    adapters.unwanted("job-1", [microbatch(ISOLATED)])
    later = microbatch(ISOLATED)
    later.attempt = 1
    assert code_of(adapters, later) is ErrorCode.CANCELLED
