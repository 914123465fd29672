"""The axes of the evaluation. Each is a family of runs with its own keys in the summary and sections on the page.

All runs of all families go through one pool, each once. A new axis is one more module with a `Family`, named here.
"""

from bench.paper.ablation import ABLATION
from bench.paper.data_parallel import DATA_PARALLEL
from bench.paper.decode import DECODING
from bench.paper.family import Family
from bench.paper.forecast import FORECAST
from bench.paper.grid import GRID
from bench.paper.heterogeneity import HETEROGENEITY
from bench.paper.memory import MEMORY_FAMILY
from bench.paper.noise import NOISE
from bench.paper.policies import POLICIES
from bench.paper.schedules import SCHEDULES_FAMILY
from bench.paper.sensitivity import SENSITIVITY
from bench.paper.sessions import SESSIONS
from bench.paper.streams import STREAMS
from bench.paper.stress import STRESS
from bench.paper.trends import TRENDS_FAMILY
from bench.paper.week import WEEK

#: In the order of the page.
FAMILIES: tuple[Family, ...] = (
    GRID, STREAMS, POLICIES, DECODING, DATA_PARALLEL, ABLATION, TRENDS_FAMILY, SENSITIVITY, HETEROGENEITY, NOISE,
    STRESS, SCHEDULES_FAMILY, MEMORY_FAMILY, WEEK, SESSIONS, FORECAST,
)  # fmt: skip
