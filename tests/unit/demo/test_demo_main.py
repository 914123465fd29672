"""Arguments: what is refused, with which exit code and words."""

import pytest

from bench.demo.__main__ import main, parse
from bench.demo.config import DemoConfig, DemoError


def test_defaults():
    assert parse([]) == DemoConfig()


def test_options_reach_the_configuration(tmp_path):
    config = parse(
        ["--repeat", "3", "--policies", "lemix, separate", "--seconds", "10", "--nodes", "3", "--stages", "2",
         "--seed", "9", "--load", "0.3", "--training-share", "0.5", "--out", str(tmp_path)]
    )  # fmt: skip
    assert (config.repeat, config.policies, config.seed, config.out) == (3, ("lemix", "separate"), 9, tmp_path)
    assert (config.traffic.seconds, config.traffic.load, config.training.share) == (10.0, 0.3, 0.5)
    assert (config.cluster.nodes, config.cluster.stages) == (3, 2)


def test_models_are_cached_in_one_place_wherever_results_go(tmp_path):
    assert parse(["--out", str(tmp_path)]).cache == parse([]).cache


def test_quick_is_smaller_but_may_be_longer():
    assert parse(["--quick"]).traffic.seconds < 10
    assert parse(["--quick", "--seconds", "12"]).traffic.seconds == 12
    assert parse(["--quick"]).model.layers < DemoConfig().model.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--nodes", "1"], "separate needs at least 2 nodes"),
        (["--stages", "9"], "--stages must be between 1 and 6"),
        (["--seconds", "1"], "--seconds must be between 5 and 3600"),
        (["--load", "1.5"], "--load must be above 0"),
        (["--training-share", "1"], "--training-share must be above 0 and below 1"),
        (["--training-share", "0"], "--training-share must be above 0 and below 1"),
        (["--policies", ""], "--policies names no policy"),
        (["--policies", "lemix,best"], "unknown policy 'best'; known: separate, round_robin, lemix, lemix_no_sync"),
        (["--policies", "lemix,lemix"], "twice"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_node_is_enough_without_separate():
    assert parse(["--nodes", "1", "--policies", "lemix"]).cluster.nodes == 1


def test_a_bad_trace_is_found_before_anything_starts(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens\n0,1\n")
    assert main(["--trace", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"demo: {path}: line 1: column 'output_tokens' is missing; need arrival_s,prompt_tokens,output_tokens\n"
    )


def test_an_unknown_option_is_one_line_and_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--polices", "lemix"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "demo: unrecognized arguments: --polices lemix (--help lists the options)\n"


def test_configuration_is_plain_json():
    values = DemoConfig().to_json()
    assert (values["out"], values["cache"]) == ("out/demo", "out/cache")
    assert values["traffic"]["load"] == 0.3
    with pytest.raises(DemoError):
        parse(["--seconds", "-3"])
