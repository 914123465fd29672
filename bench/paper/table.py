"""Columns of the comparison with separate clusters, the same on the terminal and on the page."""

from bench.report.table import Column, one, percent, two


def _points(value: float) -> str:
    return f"{value:+.1f}"


COLUMNS = (
    Column(
        "tasks ratio",
        "Tasks per held node-second over separate clusters, geometric mean of all points",
        ("throughput_ratio", "geomean"),
        two,
        "high",
    ),
    Column("max", "The same at the best point", ("throughput_ratio", "max"), two, "high"),
    Column(
        "min",
        "The same at the worst point, without points at which every policy is overloaded",
        ("throughput_ratio", "min"),
        two,
        "high",
    ),
    Column("SLO kept", "Requests within the promise, mean of all points", ("attainment_mean",), percent, "high"),
    Column(
        "worst points",
        "Attainment minus that of separate clusters at the worst point, percentage points",
        ("attainment_points", "worst"),
        _points,
        "high",
    ),
    Column(
        "max ratio",
        "Attainment over that of separate clusters at the best point",
        ("attainment_ratio", "max"),
        two,
        "high",
    ),
    Column("share of bound", "Least possible held node time / held node time, geomean", ("efficiency",), two, "high"),
    Column(
        "tasks × SLO",
        "Tasks per held node-second times attainment, geometric mean",
        ("attainment_weighted",),
        two,
        "high",
    ),
    Column(
        "makespan max",
        "End of the last task over that of separate clusters, at the worst point",
        ("makespan_ratio", "max"),
        two,
        "low",
    ),
    Column(
        "worst SLOs",
        "Worst response where separate clusters are not overloaded, in multiples of the promise",
        ("worst_response_slos",),
        one,
        "low",
    ),
)
