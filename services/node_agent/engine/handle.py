"""The name under which one stage worker's tensor travels to another."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handle:
    """Opaque name of a tensor another stage worker produced. `token` is for the transport alone."""

    token: object
