"""One Slurm for all tests that need it."""

import pytest

from cluster.slurm import Slurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if why_not():
        pytest.skip(f"Slurm: {why_not()}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "cluster", 3)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
