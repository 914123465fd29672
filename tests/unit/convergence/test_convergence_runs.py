"""Runs of a tiny model on made-up text: what must hold whatever the figures are."""

import random
from dataclasses import replace

import pytest

from bench.convergence.config import POLICIES, REFERENCE, Run, StudyConfig
from bench.convergence.study import Text, play
from deploy.local.tiny_model import write_tiny_model

CONFIG = StudyConfig(updates=8, seeds=1, replicas=(2,), piece_tokens=16, evaluate_every=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    write_tiny_model(path, hidden=32, layers=1, max_context_tokens=32)
    return path


@pytest.fixture(scope="module")
def text():
    rng = random.Random(0)
    draw = [[rng.randrange(40) for _ in range(16)] for _ in range(10)]
    return Text(training=draw[:8], held_out=draw[8:])


def run(name, model, text, replicas=2):
    policy = REFERENCE if name == REFERENCE.name else POLICIES[name]
    return play(Run(policy, replicas, 0), CONFIG, model, text)


def test_a_run_is_the_same_every_time(model, text):
    first, second = run("average_1", model, text), run("average_1", model, text)
    assert first["points"] == second["points"]


def test_averaging_keeps_replicas_nearer_than_leaving_them_alone(model, text):
    together, alone = run("average_1", model, text), run("none", model, text)
    assert (together["rounds"], alone["rounds"]) == (4, 0)
    assert 0.0 < together["points"][-1]["distance"] < alone["points"][-1]["distance"]
    assert 0.0 < together["points"][-1]["kl"] < alone["points"][-1]["kl"]


def test_one_trainer_is_no_distance_from_itself(model, text):
    points = run(REFERENCE.name, model, text, replicas=1)["points"]
    assert [point["updates"] for point in points] == [4, 8]
    assert (points[-1]["distance"], points[-1]["kl"]) == (0.0, 0.0)
    assert points[-1]["loss"] == points[-1]["best"] == points[-1]["worst"]


def test_a_copy_s_trainer_is_the_one_trainer(model, text):
    """So the best replica of checkpoint(k) has the reference's loss, and the worst the loss before training."""
    copied, alone = run("checkpoint_100", model, text), run(REFERENCE.name, model, text, replicas=1)
    losses = {copied["points"][-1]["best"], copied["points"][-1]["worst"]}
    assert alone["points"][-1]["loss"] in losses
    assert len(losses) == 2


def test_copies_are_taken_over(model, text, monkeypatch):
    every = replace(POLICIES["checkpoint_100"], every_steps=3)
    monkeypatch.setitem(POLICIES, "checkpoint_100", every)
    copied = run("checkpoint_100", model, text)
    assert copied["rounds"] == 2
    untouched = replace(every, every_steps=100)
    monkeypatch.setitem(POLICIES, "checkpoint_100", untouched)
    assert copied["points"][-1]["distance"] < run("checkpoint_100", model, text)["points"][-1]["distance"]
