"""Choice of ports."""

import socket

import pytest

from deploy.local import ports


@pytest.fixture
def taken():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_is_not_free(taken):
    assert not ports.is_free(taken)


def test_chosen_ports_are_different_and_free():
    chosen = ports.pick_free(8)
    assert len(set(chosen)) == 8
    assert all(ports.is_free(port) for port in chosen)


def test_none_left_is_an_error(monkeypatch):
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(RuntimeError, match="no 2 free ports"):
        ports.pick_free(2)


def test_a_port_is_not_chosen_twice_though_nobody_listens_yet(monkeypatch):
    first = ports.pick_free(3)

    class Random:
        def sample(self, population, k):
            return [*first, 31_999, 31_998]

    monkeypatch.setattr(ports.random, "SystemRandom", Random)
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    assert ports.pick_free(2) == [31_999, 31_998]
