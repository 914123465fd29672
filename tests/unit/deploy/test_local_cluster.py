"""Failures before and during the start of the local cluster."""

import socket

import psutil
import pytest

from deploy.local import __main__ as up
from deploy.local import cluster as cluster_module
from deploy.local.__main__ import build_parser, main
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.directory_lock import DirectoryLock
from deploy.local.process import ROOT
from deploy.local.settings import LocalClusterConfig

A100 = ROOT / "deploy" / "profiles" / "a100-llama-2-7b.json"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


async def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ClusterError, match=f"{tmp_path}/nothing is not a model directory"):
        await LocalCluster(LocalClusterConfig(model_path=tmp_path / "nothing", directory=tmp_path)).start()


@pytest.mark.parametrize(("field", "option"), [("http_port", "--port"), ("grpc_port", "--grpc-port")])
async def test_a_port_in_use_is_named_with_the_way_out(tmp_path, model, field, option):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        config = LocalClusterConfig(model_path=model, directory=tmp_path / "run", **{field: port})
        with pytest.raises(ClusterError, match=f"port {port} is in use; choose another one with {option}"):
            await LocalCluster(config).start()


async def test_two_clusters_do_not_share_a_directory(tmp_path, model):
    directory = tmp_path / "run"
    held = DirectoryLock(directory)
    config = LocalClusterConfig(model_path=model, directory=directory)
    with pytest.raises(ClusterError, match=f"{directory} is used by another cluster; .* another --directory"):
        await LocalCluster(config).start()
    held.release()
    DirectoryLock(directory).release()


async def test_a_cluster_that_did_not_start_leaves_the_directory_to_the_next(tmp_path, model):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        config = LocalClusterConfig(model_path=model, directory=tmp_path, http_port=server.getsockname()[1])
        with pytest.raises(ClusterError, match="in use; choose another one"):
            await LocalCluster(config).start()
    DirectoryLock(tmp_path).release()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, model, capsys):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "run"
    assert main(["--directory", str(directory)]) == 1
    assert capsys.readouterr().err == f"up: cannot use {directory}: Not a directory\n"
    assert main(["--directory", str(directory), "--model", str(model)]) == 1
    assert capsys.readouterr().err == f"\nThe cluster stopped: cannot write to {directory}: Not a directory\n"


async def test_a_service_that_dies_while_starting_is_reported_with_its_log_and_all_is_stopped(tmp_path, model):
    config = LocalClusterConfig(
        model_path=model, directory=tmp_path / "run", profiler={"repetitions": "many"}, stop_timeout_s=5.0
    )
    cluster = LocalCluster(config)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ClusterError, match="ended with exit code") as raised:
        await cluster.start()
    assert "run/logs/" in str(raised.value)
    assert cluster.processes() == {}
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_services_environment(monkeypatch):
    environment = cluster_module._child_environment(
        {"LEMIX_REDIS_URL": "redis://other", "LEMIX_SCHEDULER_NODE_LEASE_S": "3", "PYTHONPATH": "/mine"}
    )
    assert "LEMIX_REDIS_URL" not in environment  # the cluster has decided; a service must not decide otherwise
    assert environment["LEMIX_SCHEDULER_NODE_LEASE_S"] == "3"
    assert environment["PYTHONPATH"].split(":")[-1] == "/mine"


def test_make_up_reports_what_keeps_it_from_starting(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--directory", str(tmp_path / "run")]) == 1
    assert "is not a model directory" in capsys.readouterr().err


@pytest.fixture
def described(monkeypatch):
    """The cluster that `make up` would start."""
    found = []

    class Described(ClusterError):
        pass

    def cluster(config):
        found.append(config)
        raise Described

    monkeypatch.setattr(up, "LocalCluster", cluster)
    return found


def test_emulated_nodes_have_the_stages_of_their_profile_and_a_model_without_weights(tmp_path, described):
    assert main(["--directory", str(tmp_path), "--emulate", str(A100), "--time-scale", "4"]) == 1
    (config,) = described
    assert config.num_stages == 2
    assert config.node == {"engine": "emulated", "emulated_profile": str(A100), "time_scale": 4.0}
    assert config.model_name == "llama-2-7b"
    assert (config.model_path / "config.json").is_file()
    assert not config.pin_cpus, "they compute nothing"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--emulate", "README.md"], "README.md is not a profile"),
        (["--emulate", "nowhere.json"], "nowhere.json is not a profile: there is no such file"),
        (["--emulate", str(A100), "--stages", "3"], "is of 2 stages, --stages is 3"),
        (["--emulate", str(A100), "--time-scale", "0"], "--time-scale must be positive, not 0"),
    ],
)
def test_a_profile_that_cannot_be_emulated_is_named(tmp_path, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(ROOT)
    assert main(["--directory", str(tmp_path), *arguments]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--nodes", "0"], ["--nodes", "x"], ["--stages", "-1"], ["--port", "x"], ["--port", "65536"], ["--unknown"]],
)
def test_bad_options_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        build_parser().parse_args(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("up: ")
    assert error.count("\n") == 1
    assert "_positive" not in error
