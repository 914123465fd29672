"""The families beside the grid, on rows made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.paper import heterogeneity, policies, sensitivity, streams, stress, trends, week
from bench.paper.ablation import PARTS
from bench.paper.config import PaperConfig
from bench.paper.families import FAMILIES
from bench.paper.knobs import KNOBS
from bench.paper.scenario import Point
from bench.paper.series import over_seeds
from bench.paper.variants import everywhere, policy_of
from services.scheduler.core.policies import create
from services.simulator.types import Microbatch, TaskRecord

_POINTS = [Point(8.0, 0.1, 0.06), Point(16.0, 0.5, 0.06)]


def _row(label, policy=None, rate=8.0, seed=0, **changes):
    return {
        "label": label, "policy": policy or label.split(",")[0], "rate": rate, "training_share": 0.5,
        "mean_forward_s": 0.06, "seed": seed, "tasks_per_held_node_s": 1.0, "slo_attainment": 0.9, "efficiency": 0.5,
        "makespan_s": 100.0, "worst_response_slos": 2.0, "n_requests": 100, "n_tasks": 200, "nodes_used": 4,
        "mean_response_s": 0.5, "length_variance_within": 1.0, "load_skew": 0.1, "decisions": "a",
        "training_waiting_share": 0.0, "training_wait_max_s": 0.0,
    } | changes  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_option_of_every_run_is_known_to_its_policy(family):
    runs = [run for _, run in family.runs(PaperConfig())]
    assert runs
    for policy, options in {(run.policy, run.options) for run in runs}:
        create(policy, dict(options))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_label_names_one_run_per_place_and_seed(family):
    labelled = family.runs(PaperConfig())
    places = [(label, run.point, run.seed) for label, run in labelled]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("label", ["lemix", "lemix, both", "lemix+"])
def test_a_label_has_the_colour_of_its_policy(label):
    assert policy_of(label) == "lemix"


def test_names_of_families_are_distinct():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_grid_is_shared():
    """What several families look at is simulated once: the policies on their 9 points are in the grid already."""
    grid, axis = ({run for _, run in family.runs(PaperConfig())} for family in (FAMILIES[0], policies.POLICIES))
    assert len(axis - grid) == len(axis) * 5 // 11


def test_everywhere_is_every_point_and_seed():
    found = everywhere("some", _POINTS, (0, 1), 10, "lemix", noise=0.1)
    assert [(run.seed, run.point) for _, run in found] == [(seed, point) for seed in (0, 1) for point in _POINTS]
    assert {(label, run.policy, run.noise, run.num_tasks) for label, run in found} == {("some", "lemix", 0.1, 10)}


def test_plus_variants_get_the_nodes_that_lemix_used_there():
    rows = [_row("lemix", nodes_used=2), _row("lemix", rate=16.0, nodes_used=4), _row("random", nodes_used=1)]
    found = {(label, run.point.rate): run.options for label, run in policies.with_fewer_nodes(PaperConfig(), rows)}
    assert found["round_robin+", 8.0] == (("max_nodes", 2),)
    assert found["round_robin+", 16.0] == ()
    assert len(found) == 2 * 5


def test_lemix_is_claimed_to_beat_the_registry_and_not_the_plus_variants():
    rows = [_row(name) for name in dict.fromkeys(label for label, _ in policies.runs(PaperConfig()))]
    rows = [{**row, "tasks_per_held_node_s": 2.0} if row["label"] == "lemix" else row for row in rows]
    rows.append(_row("random+", tasks_per_held_node_s=9.0))
    found = policies.POLICIES.summarise(rows)
    (claim,) = found["claims"]
    assert claim["values"] == [pytest.approx(2.0)]
    assert claim["verdict"] == "held"
    assert found["policies"]["policies"]["random+"]["throughput_ratio"]["geomean"] == pytest.approx(9.0)


def test_streams_compare_with_either_kind_of_separate_clusters():
    rows = [
        _row(streams.PER_NODE, tasks_per_held_node_s=2.0),
        _row(streams.ONE, tasks_per_held_node_s=1.0),
        _row("lemix", tasks_per_held_node_s=3.0),
    ]
    found = streams.summarise(rows)
    ratios = {
        kind: under["policies"]["lemix"]["throughput_ratio"]["geomean"] for kind, under in found[streams.KEY].items()
    }
    assert ratios == {streams.PER_NODE: pytest.approx(1.5), streams.ONE: pytest.approx(3.0)}
    assert [claim["verdict"] for claim in found["claims"]] == ["held", "held"]
    assert streams.summarise(rows[:2])["claims"] == []


def _trend_rows(metric, by_value, knob="open_at"):
    rows = []
    for trend in trends.TRENDS:
        for index, value in enumerate(trend.knob.values):
            changes = {metric: by_value[index]} if trend.knob.name == knob else {}
            rows.append(_row(f"lemix, {trend.knob.name}={value:g}", **changes))
    return list({row["label"]: row for row in rows}.values())


@pytest.mark.parametrize(
    ("figures", "rho", "verdict"),
    [
        ((1.0, 2.0, 3.0, 4.0, 5.0), 1.0, "held"),
        ((5.0, 4.0, 3.0, 2.0, 1.0), -1.0, "missed"),
        ((1.0,) * 5, 0.0, "missed"),
    ],
)
def test_a_trend_is_a_rank_correlation(figures, rho, verdict):
    found = trends.summarise(_trend_rows("tasks_per_held_node_s", figures))
    item = found["trends"]["trends"][0]
    assert item["rho"] == [pytest.approx(rho)]
    assert [figure["median"] for figure in item["figures"]] == pytest.approx(figures)
    assert found["claims"][0]["verdict"] == verdict


def test_a_trend_downwards_counts_when_that_is_wanted():
    found = trends.summarise(_trend_rows("length_variance_within", (0.9, 0.8, 0.7, 0.6, 0.5), "consistency"))
    claim = found["claims"][2]
    assert claim["values"] == [pytest.approx(1.0)]
    assert claim["verdict"] == "held"


def _sensitivity_rows(changed=()):
    labels = dict.fromkeys(label for label, _ in sensitivity.runs(PaperConfig()))
    return [_row(label, decisions="b" if label in changed else "a") for label in labels]


def test_a_knob_that_changes_no_decision_is_inert():
    found = sensitivity.summarise(_sensitivity_rows({"lemix, open_at=2"}))
    knobs = found["sensitivity"]["policies"]
    assert knobs["paper_ratio"]["lambda_1"]["inert"]
    assert not knobs["lemix"]["open_at"]["inert"]
    assert [effect["runs_changed"] for effect in knobs["lemix"]["open_at"]["values"]] == [0, 0, 0, 0, 1]
    assert [claim["verdict"] for claim in found["claims"]] == ["held"]


def test_a_knob_that_should_be_inert_and_is_not_is_a_miss():
    found = sensitivity.summarise(_sensitivity_rows({"paper_ratio, lambda_1=1.5"}))
    assert [claim["verdict"] for claim in found["claims"]] == ["missed"]


@pytest.mark.parametrize("policy", sorted(KNOBS))
def test_the_default_of_every_knob_is_the_policys_own(policy):
    """Or a run without the option would stand for another value."""
    attributes = vars(create(policy, {}))
    for knob in KNOBS[policy]:
        assert attributes[f"_{knob.name}"] == knob.default
        assert knob.default in knob.values
        assert knob.options(knob.default) == ()
        assert len(knob.values) == 5
        assert list(knob.values) == sorted(knob.values)


def test_ablated_parts_belong_to_published_policies():
    assert {"paper_additive", "paper_ratio", "paper_released", "lemix"} == set(PARTS)


def test_heterogeneity_compares_within_a_condition():
    labels = [(policy, name) for name in heterogeneity.conditions() for policy in heterogeneity.POLICIES]
    rows = [
        _row(f"{policy}, {name}", tasks_per_held_node_s=2.0 if (policy, name) == ("lemix", "bursty") else 1.0)
        for policy, name in labels
    ]
    found = heterogeneity.summarise(rows)["heterogeneity"]
    ratios = {name: under["policies"]["lemix"]["throughput_ratio"]["geomean"] for name, under in found.items()}
    assert ratios.pop("bursty") == pytest.approx(2.0)
    assert set(ratios.values()) == {1.0}
    assert len(ratios) == 6


def test_hold_back_sets_in_where_enough_training_waits():
    shares = {50.0: 0.01, 100.0: 0.2, 150.0: 0.9}
    rows = [_row("lemix", rate=rate, seed=seed, training_waiting_share=share)
            for rate, share in shares.items() for seed in (0, 1)]  # fmt: skip
    rows += [_row("separate", rate=rate) for rate in shares]
    found = stress.summarise(rows)["stress"]["policies"]
    assert found["lemix"]["hold_back_sets_in"] == 100.0
    assert found["separate"]["hold_back_sets_in"] is None


def _record(begin_s, end_s):
    return TaskRecord(Microbatch("m", begin_s, "job", 1, 8), ended_s=end_s, outcome="trained" if end_s else "")


def test_open_tasks_per_day():
    day_s = week.DAY_S
    records = [_record(0.0, day_s / 2), _record(1.5 * day_s, 2.25 * day_s), _record(2.5 * day_s, None)]
    assert week.mean_open(records, 3 * day_s) == pytest.approx([0.5, 0.5, 0.75])
    assert week.mean_open(records, 2.75 * day_s) == pytest.approx([0.5, 0.5, 0.5 / 0.75])
    assert week.mean_open(records, 2.25 * day_s) == pytest.approx([0.5, 0.5])
    assert week.mean_open(records[:1], 0.25 * day_s) == pytest.approx([1.0])


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 2.0)), max_size=20))
def test_open_time_is_neither_lost_nor_made(spans):
    records = [_record(begin * week.DAY_S, (begin + length) * week.DAY_S + 1.0) for begin, length in spans]
    total_s = sum(record.ended_s - record.work.arrival_s for record in records)
    assert sum(week.mean_open(records, 6 * week.DAY_S)) * week.DAY_S == pytest.approx(total_s)


def test_drift_is_tasks_per_day():
    assert week.drift([1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert week.drift([2.0]) == 0.0


def test_over_seeds_ignores_what_was_not_measured():
    assert over_seeds([3.0, None, 1.0]) == {"low": 1.0, "median": 2.0, "high": 3.0}
    assert over_seeds([None]) is None


def test_the_trends_of_consistency_are_looked_at_with_all_nodes_in_use():
    runs = dict(trends.runs(PaperConfig()))
    assert dict(runs["lemix, consistency=2"].options) == {"open_at": 0.0, "slo_fraction": 0.0, "consistency": 2.0}
    assert dict(runs["lemix, consistency=0"].options) == {"open_at": 0.0, "slo_fraction": 0.0}
    assert dict(runs["lemix, open_at=2"].options) == {"open_at": 2.0}
