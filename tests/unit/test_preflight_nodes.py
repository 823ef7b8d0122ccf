"""What nodes are judged for, by reports as their ranks make them; a look together is run in earnest on two ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from inplace_ttt.resilience.preflight.node import State
from inplace_ttt.resilience.preflight.ranks import Report, versions
from inplace_ttt.resilience.preflight.verdict import judge
from launching import ROOT

HOSTS = ("node1", "node1", "node2", "node2", "node3", "node3")
VERSIONS = {"torch": "2.11.0", "code": "abc"}
OTHER_TORCH, OTHER_CODE = VERSIONS | {"torch": "2.12.0"}, VERSIONS | {"code": "def"}


def reports() -> list[Report]:
    """Three good nodes with two GPUs each."""
    return [
        Report(
            rank,
            host,
            VERSIONS,
            gpu="H100 79 GiB",
            free=0.99,
            flops=7e14 * (1 + rank / 100),
            clock=0.01 * rank,
            reduce_bandwidth=3e11,
            link=3e11 if rank % 2 else 4e10,
            neighbour=HOSTS[rank - 1],
        )
        for rank, host in enumerate(HOSTS)
    ]


def found(everyone: list[Report], part: str):
    return next(finding for finding in judge(everyone) if finding.part == part)


def test_good_nodes_are_good():
    assert {finding.state for finding in judge(reports())} == {State.THERE}
    assert found(reports(), "ring").found == "300 GB/s within nodes, 40 GB/s between nodes"


@pytest.mark.parametrize(
    ("part", "state", "said", "change"),
    [
        ("nodes", State.BROKEN, "node2: fast-weight kernels", dict(broken=["fast-weight kernels: wrong by 1e-01"])),
        ("versions", State.BROKEN, "node2 has torch 2.12.0, others have 2.11.0", dict(versions=OTHER_TORCH)),
        ("versions", State.BROKEN, "node2 has code def, others have abc", dict(versions=OTHER_CODE)),
        ("GPUs", State.BROKEN, "node2 rank 2 has 3 uncorrected memory errors", dict(ecc=3)),
        ("GPUs", State.BROKEN, "node2 rank 2: wrong matrix product", dict(wrong=True)),
        ("GPUs", State.BROKEN, "node2 rank 2: 75% of its memory is used", dict(free=0.25)),
        ("GPUs", State.LACKING, "node2 has A100 79 GiB, others have H100", dict(gpu="A100 79 GiB")),
        ("arithmetic", State.LACKING, "node2 rank 2: 70% of the median", dict(flops=5e14)),
        ("clocks", State.LACKING, "node2 is 30.0 s behind", dict(clock=-30.0)),
        ("run.dir", State.BROKEN, "node2: 'runs' is full", dict(folder="'runs' is full")),
        ("ring", State.LACKING, "rank 1 (node1) to rank 2 (node2) only 1 GB/s", dict(link=1e9)),
    ],
)  # fmt: skip
def test_what_is_bad_is_named_by_its_node(part, state, said, change):
    everyone = reports()
    for key, value in change.items():
        setattr(everyone[2], key, value)
    finding = found(everyone, part)
    assert finding.state is state and said in finding.found
    assert all(other.state is State.THERE for other in judge(everyone) if other.part != part)


def test_the_code_of_a_node_has_a_checksum():
    assert versions()["code"] == versions()["code"] and len(versions()["code"]) == 12


def together(folder: Path, ranks: int = 2) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, str(ROOT / "launch/preflight.py"), "--folder", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_ranks_look_together(tmp_path):
    done = together(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "training can run here" in done.stdout and done.stdout.count("readable and writable on all nodes") == 1
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_written_is_named_with_its_node(tmp_path):
    (tmp_path / "run").write_text("no folder")
    done = together(tmp_path / "run")
    assert done.returncode != 0
    assert f"run.dir: {socket.gethostname()}: '{tmp_path / 'run'}' cannot be written" in done.stderr
