"""What is refused, and which runs there are."""

import pytest

from bench.convergence.__main__ import main, parse
from bench.convergence.config import POLICIES, REFERENCE, Run, StudyConfig, runs
from bench.convergence.study import is_round


def test_defaults():
    assert parse([]) == StudyConfig()


def test_every_policy_runs_with_every_number_of_replicas_and_seed():
    found = runs(StudyConfig(seeds=2, replicas=(2, 4), policies=("none", "average_10")))
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2)
    assert sum(run.policy is REFERENCE for run in found) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "none,best"], "unknown policy 'best'"),
        (["--policies", ""], "--policies names no policy"),
        (["--policies", "none,none"], "names a policy twice"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--replicas", "1"], "--replicas must name numbers of at least 2"),
        (["--replicas", "two"], "--replicas must be numbers"),
        (["--replicas", "3"], "200 updates cannot be shared by 3 replicas"),
        (["--updates", "2001"], "--updates must be a multiple of 200"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rounds_come_when_every_trainer_has_made_its_steps():
    averaging = Run(POLICIES["average_10"], 4, 0)
    assert [update for update in range(1, 100) if is_round(averaging, update)] == [40, 80]
    copying = Run(POLICIES["checkpoint_100"], 4, 0)
    assert [update for update in range(1, 301) if is_round(copying, update)] == [100, 200, 300]
    assert not any(is_round(Run(POLICIES["none"], 2, 0), update) for update in range(1, 1000))
