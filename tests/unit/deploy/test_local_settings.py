"""What the local cluster tells its services."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.settings import Addresses, LocalClusterConfig, services_of, stage_cores
from deploy.settings_check import settings_class
from services.runtime.config import validate

ADDRESSES = Addresses("redis://127.0.0.1:1/0", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4", "127.0.0.1:5")


@pytest.fixture
def config(tmp_path):
    return LocalClusterConfig(model_path=tmp_path / "tiny", directory=tmp_path / "run", num_nodes=2, num_stages=2)


def services(config, cores=(0, 1, 2, 3)):
    return {service.name: service for service in services_of(config, ADDRESSES, cores)}


def test_services_come_in_the_order_of_dependence(config):
    assert list(services(config)) == ["profiler", "scheduler", "node-0", "node-1", "gateway"]


def test_every_service_accepts_its_settings(config, tmp_path):
    config = dataclasses.replace(config, event_log=tmp_path / "events", core={"sync_every_steps": 4})
    for service in services(config).values():
        validate(settings_class(service.module), service.settings)


def test_overrides_win_and_the_policy_is_the_core_s(config):
    config = dataclasses.replace(
        config,
        policy="round_robin",
        core={"max_hold_back_s": 1.0},
        scheduler={"node_lease_s": 2.0},
        node={"max_batch": 3},
        gateway={"request_timeout_s": 9.0},
        profiler={"repetitions": 2},
    )
    by_name = services(config)
    assert by_name["scheduler"].settings["core"] == {"policy": "round_robin", "max_hold_back_s": 1.0}
    assert by_name["scheduler"].settings["node_lease_s"] == 2.0
    assert by_name["node-1"].settings["max_batch"] == 3
    assert by_name["gateway"].settings["request_timeout_s"] == 9.0
    assert by_name["profiler"].settings["repetitions"] == 2


def test_nodes_differ_in_id_and_cores_only(config):
    by_name = services(config)
    first, second = by_name["node-0"].settings, by_name["node-1"].settings
    assert {key for key in first if first[key] != second[key]} == {"node_id", "cpus"}
    assert (first["cpus"], second["cpus"]) == ([0, 1], [2, 3])
    assert first["nice"] == config.nice


def test_profiles_can_outlive_the_run_directory(config, tmp_path):
    assert services(config)["profiler"].settings["directory"] == str(tmp_path / "run" / "profiles")
    config = dataclasses.replace(config, profiles_directory=tmp_path / "kept")
    assert services(config)["profiler"].settings["directory"] == str(tmp_path / "kept")


@given(
    nodes=st.integers(1, 6),
    stages=st.integers(1, 6),
    cores=st.lists(st.integers(0, 127), unique=True, max_size=40),
    pin=st.booleans(),
)
def test_a_stage_never_shares_a_core_with_another(nodes, stages, cores, pin, tmp_path_factory):
    config = LocalClusterConfig(
        model_path=tmp_path_factory.getbasetemp(),
        directory=tmp_path_factory.getbasetemp(),
        num_nodes=nodes,
        num_stages=stages,
        pin_cpus=pin,
    )
    chosen = stage_cores(config, cores)
    assert len(chosen) == nodes
    if pin and len(cores) >= nodes * stages:
        taken = [core for node in chosen for core in node]
        assert len(taken) == len(set(taken)) == nodes * stages
        assert set(taken) <= set(cores)
    else:
        assert chosen == [()] * nodes
