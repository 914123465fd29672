"""What is printed at the end."""

import io

import pytest
from rich.console import Console

from bench.demo.terminal import print_results
from bench.report.progress import Terminal
from tests.unit.demo import synthetic


def _console(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def _printed(summary, width=100):
    console = _console(width)
    print_results(console, summary)
    return console.file.getvalue()


@pytest.mark.parametrize("repetitions", [1, 3])
def test_the_table_fits_a_terminal_of_80_columns_without_cutting(repetitions):
    printed = _printed(synthetic.whole_summary(repetitions), width=80)
    assert "…" not in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    for name in ("separate", "round_robin", "lemix", "lemix_no_sync"):
        assert name in printed
    assert "98.8 %" in printed


def test_repetitions_show_their_spread():
    assert "98.8–98.8" not in _printed(synthetic.whole_summary(1))
    assert "98.8–98.8" in _printed(synthetic.whole_summary(2))


def test_claims_come_with_verdict_and_threshold():
    printed = _printed(synthetic.whole_summary(), width=200)
    assert "missed after the drift" in printed
    assert "times (needs at most 1)" in printed
    assert "points (needs at least 0)" in printed


def test_an_unresolved_claim_says_why():
    summary = synthetic.whole_summary()
    summary["claims"][0] |= {"verdict": "unresolved", "reason": "other programs used 41 % of the CPU"}
    assert "unresolved (other programs used 41 % of the CPU) lemix finishes" in _printed(summary, width=200)


def test_what_unresolved_means_depends_on_the_repetitions():
    for repetitions, words in (
        (1, "Unresolved: within 0.03 (or 3 points)"),
        (2, "Unresolved: the repetitions disagree"),
    ):
        summary = synthetic.whole_summary(repetitions)
        summary["claims"][0]["verdict"] = "unresolved"
        assert words in _printed(summary)


def test_claims_of_several_repetitions_tell_their_spread():
    summary = synthetic.whole_summary(2)
    claim = next(claim for claim in summary["claims"] if claim["name"] == "loss_after_drift")
    claim["values"], claim["median"] = [0.9, 1.1], 1.0
    assert "1.00 times, 0.90 times to 1.10 times" in " ".join(_printed(summary).split())


def test_a_given_share_of_training_is_no_claim_of_how_much_is_trained():
    names = [{claim["name"] for claim in synthetic.whole_summary(share=share)["claims"]} for share in (None, 0.5)]
    assert names[0] - names[1] == {"training"}
    assert "50 % of all tasks" in synthetic.whole_summary(share=0.5)["training"]["description"]


def test_without_a_terminal_steps_are_lines():
    console = _console()
    screen = Terminal(console, 10.0)
    with screen.running(), screen.step("first", 4.0):
        screen.advance(2.0, "half")
        screen.say("a line [that] stays")
        screen.warn("mind [this]")
    assert "first\n" in console.file.getvalue()
    assert "a line [that] stays" in console.file.getvalue()
    assert "warning: mind [this]" in console.file.getvalue()
