"""Free TCP ports on the loopback interface."""

import itertools
import random
import socket
from collections import deque

#: Below the range Linux picks outgoing ports from, so that no connection takes one between choice and use.
_FIRST, _LAST = 20000, 32000
#: What this process chose last is not chosen again: whoever asked may not listen yet.
_chosen: deque[int] = deque(maxlen=1000)


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def pick_free(count: int) -> list[int]:
    """That many ports that are free now and were not chosen before. Raises RuntimeError when there are none."""
    candidates = random.SystemRandom().sample(range(_FIRST, _LAST), k=max(50, 10 * count))
    free = (port for port in candidates if port not in _chosen and is_free(port))
    ports = list(itertools.islice(free, count))
    if len(ports) < count:
        raise RuntimeError(f"no {count} free ports between {_FIRST} and {_LAST}")
    _chosen.extend(ports)
    return ports
