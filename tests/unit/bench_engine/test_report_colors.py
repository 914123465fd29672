"""Charts that show every policy must tell them apart."""

from bench.decision import VARIANTS
from bench.report.colors import policy_color


def test_no_two_policies_have_one_colour():
    assert len({policy_color(name) for name in VARIANTS}) == len(VARIANTS)
