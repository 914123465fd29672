"""What people are told to type exists: make targets, options, services, links of the documentation."""

import argparse
import re
from pathlib import Path

import pytest

from deploy.local.__main__ import build_parser
from deploy.settings_check import settings_class

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SERVICES = ("gateway", "node_agent", "profiler", "scheduler")

#: Frozen: people's scripts use these. A change here is a change of the interface.
UP_OPTIONS = {
    "--help", "--model", "--nodes", "--stages", "--policy", "--port", "--grpc-port", "--directory", "--redis-url",
    "--nice", "--no-pin", "--sync", "--sync-every", "--emulate",
    "--time-scale",
}  # fmt: skip
TARGETS = {
    "help", "install", "demo", "up", "test", "nightly", "check", "fmt", "lint", "types", "imports", "protos",
    "protos-lint", "protos-check", "compose-config", "bench", "paper", "simulate", "convergence", "fidelity",
    "colocation", "clean",
}  # fmt: skip


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def make_targets():
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def long_options(parser: argparse.ArgumentParser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def test_the_make_targets_are_the_known_ones():
    assert make_targets() >= TARGETS


@named(DOCUMENTS)
def test_every_make_target_a_document_names_exists(path):
    told = set(re.findall(r"(?:^|`|\n)make ([a-z][a-z-]*)", path.read_text(encoding="utf-8")))
    assert told - make_targets() == set()


@named(DOCUMENTS)
def test_every_file_a_document_links_to_exists(path):
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@named(DOCUMENTS)
def test_every_option_of_make_up_a_document_names_exists(path):
    told = re.findall(r'UP_ARGS="([^"]*)"', path.read_text(encoding="utf-8"))
    options = {word for text in told for word in text.split() if word.startswith("--")}
    assert options - long_options(build_parser()) == set()


def test_the_options_of_make_up_are_frozen():
    assert long_options(build_parser()) == UP_OPTIONS


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_can_be_started_and_configured_by_name(service):
    assert (ROOT / "services" / service / "__main__.py").is_file()
    assert {"listen", "log", "metrics_port", "shutdown_grace_s"} <= set(settings_class(service).model_fields)
