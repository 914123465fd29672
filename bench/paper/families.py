"""The axes of the evaluation. Each is a family of runs with its own keys in the summary and sections on the page.

All runs of all families go through one pool. A new axis (another parallelism, decode, an ablation, a sensitivity sweep)
is one more module with a `Family`, named here.
"""

from bench.paper.family import Family
from bench.paper.grid import GRID

#: In the order of the page.
FAMILIES: tuple[Family, ...] = (GRID,)
