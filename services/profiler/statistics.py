"""Distribution of the losses and lengths of sample examples (paper section 4: the profiled data)."""

from collections.abc import Sequence

import numpy as np

from lemix.internal.v1 import profile_pb2


def distribution(values: Sequence[float]) -> profile_pb2.Distribution:
    """Count, mean, standard deviation and quantiles of at least one value."""
    array = np.asarray(values, dtype=np.float64)
    p50, p99 = np.quantile(array, [0.5, 0.99])
    return profile_pb2.Distribution(
        count=len(array), mean=float(array.mean()), std=float(array.std()), p50=float(p50), p99=float(p99)
    )
