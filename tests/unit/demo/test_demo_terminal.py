"""What is printed at the end."""

import io

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


def test_the_table_fits_a_terminal_of_80_columns_without_cutting():
    printed = _printed(synthetic.whole_summary(1), width=80)
    assert "…" not in printed
    for name in ("separate", "round_robin", "lemix", "lemix_no_sync"):
        assert name in printed
    assert "SLO kept" in printed
    assert "98.8 %" in printed


def test_repetitions_show_their_spread():
    assert " – " not in _printed(synthetic.whole_summary(1))
    assert "98.8 % – 98.8 %" in _printed(synthetic.whole_summary(2))


def test_claims_come_with_verdict_and_threshold():
    printed = _printed(synthetic.whole_summary(), width=200)
    assert "missed  after the drift" in printed
    assert "times (at most 1.00)" in printed
    assert "points (at least +0.0)" in printed


def test_without_a_terminal_steps_are_lines():
    console = _console()
    screen = Terminal(console, 10.0)
    with screen.running(), screen.step("first", 4.0):
        screen.advance(2.0, "half")
        screen.say("a line [that] stays")
    assert "first\n" in console.file.getvalue()
    assert "a line [that] stays" in console.file.getvalue()
