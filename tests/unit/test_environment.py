"""A wrong environment is named before anything is opened."""

import os
import resource
import subprocess
import sys
import threading

import pytest

from inplace_ttt import environment
from inplace_ttt.config import UserError
from inplace_ttt.environment import World, check_environment, master_address
from inplace_ttt.resilience.rendezvous import Rendezvous
from launching import ROOT

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


@pytest.fixture
def variables(monkeypatch):
    for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values: str):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(WORLD_SIZE="4"), "RANK is not set"),
        (dict(RANK=""), "RANK is empty"),
        (dict(RANK="0", WORLD_SIZE="4"), "LOCAL_RANK is not set"),
        (dict(RANK="a", WORLD_SIZE="4", LOCAL_RANK="0"), "RANK is 'a'"),
        (dict(RANK="-1", WORLD_SIZE="4", LOCAL_RANK="0"), "RANK is '-1'"),
        (dict(RANK="0", WORLD_SIZE="1e9", LOCAL_RANK="0"), "WORLD_SIZE is '1e9'"),
        (dict(RANK="0", WORLD_SIZE="0", LOCAL_RANK="0"), "WORLD_SIZE=0"),
        (dict(RANK="5", WORLD_SIZE="4", LOCAL_RANK="0"), "RANK=5 is not below WORLD_SIZE=4"),
        (dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"), "LOCAL_RANK=2 is not below"),
        (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), "LOCAL_WORLD_SIZE=4 is above"),
    ],
)
def test_contradictions_are_named(values, said, variables):
    variables(**values)
    with pytest.raises(UserError) as caught:
        World.from_environment()
    assert said in str(caught.value) and "torchrun" in str(caught.value)


def test_alone_without_any(variables):
    assert World.from_environment() == World(0, 1, 0)
    variables(WORLD_SIZE="1")
    assert World.from_environment() == World(0, 1, 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(MASTER_PORT="1234"), "MASTER_ADDR is not set"),
        (dict(MASTER_ADDR="localhost"), "MASTER_PORT is not set"),
        (dict(MASTER_ADDR="localhost", MASTER_PORT="abc"), "MASTER_PORT is 'abc'"),
        (dict(MASTER_ADDR="localhost", MASTER_PORT="99999"), "MASTER_PORT is '99999'"),
        (dict(MASTER_ADDR="no.such.host.invalid", MASTER_PORT="1234"), "MASTER_ADDR=no.such.host.invalid cannot be"),
    ],
)
def test_a_first_rank_that_cannot_be_found(values, said, variables):
    variables(**values)
    with pytest.raises(UserError, match=said):
        master_address()


def test_interfaces(variables):
    variables(GLOO_SOCKET_IFNAME="eth77")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=eth77 names an interface that this host does not have"):
        check_environment()
    variables(GLOO_SOCKET_IFNAME="lo")
    check_environment()


def test_a_level_of_torchs_messages_that_is_not_known(monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "garbage")
    with pytest.raises(UserError, match="TORCH_DISTRIBUTED_DEBUG=garbage is not a value that torch knows"):
        check_environment()
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "info")
    check_environment()


def test_too_few_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(UserError, match="ulimit -n 64"):
        check_environment()


def test_an_agents_store_that_is_not_there(variables, monkeypatch):
    monkeypatch.setattr("inplace_ttt.resilience.rendezvous.ANSWERS", 1.0)
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_USE_AGENT_STORE="True")
    with pytest.raises(UserError, match=r"no response from MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=1"):
        Rendezvous(World(1, 2, 1), 0.02)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_our_own_store_listens_on_one_address(variables):
    import psutil

    port = free_port()
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    first = Rendezvous(World(0, 2, 0), 0.2)
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port]
    assert [place.ip for place in listening] == ["127.0.0.1"]
    other = Rendezvous(World(1, 2, 1), 0.2)
    threads = [threading.Thread(target=one.wait_for_all) for one in (first, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_ranks_that_do_not_come_are_named(variables):
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(UserError, match=r"1 of 2 ranks \(1\) did not connect"):
        Rendezvous(World(0, 2, 0), 0.01).wait_for_all()


def test_the_command_says_it_once_and_ends_with_2(tmp_path):
    environment_of_it = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, ROOT / "launch/train.py", "recipe=tiny_ttt", f"run.dir={tmp_path}/run"],
        env={**environment_of_it, "WORLD_SIZE": "4"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: RANK is not set")


def test_within_gives_up():
    assert environment.run_with_timeout(0.05, threading.Event().wait) is None
    assert environment.run_with_timeout(5, lambda: 3) == 3
