"""What every HTML report must hold."""

import re
from xml.etree import ElementTree


def assert_self_contained(page):
    """It loads nothing and runs nothing."""
    assert not re.findall(r"""(?:src|href)=|@import|url\(""", page)
    assert "<script" not in page


def charts(page):
    """Source of every chart; each is well formed and named."""
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for chart in found:
        assert ElementTree.fromstring(chart).attrib["aria-label"]
    return found
