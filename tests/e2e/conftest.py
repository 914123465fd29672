"""One tiny model and one store of profiles for all clusters of a test run."""

import pytest

from deploy.local.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(path, hidden=64, layers=4, max_context_tokens=1024)
    return path


@pytest.fixture(scope="session")
def profiles(tmp_path_factory):
    """Profiles outlive a cluster, so that only its first start measures."""
    return tmp_path_factory.mktemp("profiles")
