"""Mean coefficients of nodes."""

from services.latency import LatencyModel, LatencyTable, MixedCost, NodeLatency, OpKind
from services.scheduler.core.policies.mean_latency import mean_latency


def _node(form: str, *coefficients: float, stages: int = 1) -> NodeLatency:
    return NodeLatency(({OpKind.PREFILL: LatencyModel(form, coefficients)},) * stages)


def test_coefficients_are_averaged() -> None:
    found = mean_latency([_node("affine", 1.0, 4.0), _node("affine", 3.0, 0.0)])
    assert found.models[0][OpKind.PREFILL].coefficients == (2.0, 2.0)


def _tabulated(lengths: tuple[int, ...], *durations: float) -> NodeLatency:
    table = LatencyTable((1,), lengths, durations)
    return NodeLatency(({OpKind.PREFILL: LatencyModel("tabulated", (), table=table)},))


def test_tables_over_one_grid_are_averaged() -> None:
    first = _tabulated((8, 16), 1.0, 2.0)
    assert mean_latency([first, _tabulated((8, 16), 3.0, 6.0)]) == _tabulated((8, 16), 2.0, 4.0)
    assert mean_latency([first, _tabulated((8, 32), 3.0, 6.0)]) == first


def test_what_a_prefill_and_a_decode_cost_together_is_averaged_where_all_know_it() -> None:
    first, second = (NodeLatency(({},), mixed=(MixedCost(value, 1.0, 2.0 * value),)) for value in (0.5, 1.5))
    assert mean_latency([first, second]).mixed == (MixedCost(1.0, 1.0, 2.0),)
    assert mean_latency([first, NodeLatency(({},))]).mixed == ()


def test_of_other_forms_and_other_numbers_of_stages_the_first_one_counts() -> None:
    first = _node("affine", 1.0, 4.0)
    assert mean_latency([first, _node("quadratic", 1.0)]) == first
    assert mean_latency([first, _node("affine", 3.0, 8.0, stages=2)]) == first
