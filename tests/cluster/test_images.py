"""The images are really built and run: the laptop's whole, the GPU's on a base that stands in for NVIDIA's."""

import os
import subprocess
import time

import pytest

from cluster.docker import Docker, why_not
from launching import ROOT, SMALL, numbers

if why_not():
    pytest.skip(f"Docker: {why_not()}", allow_module_level=True)

BASE, STAND_IN = "localhost/base", "localhost/stand-in"


@pytest.fixture(scope="module")
def docker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docker")
    daemon = Docker(folder / "daemon")
    try:
        daemon.up()
        daemon.make_base(BASE, folder / "base")
        yield daemon
    finally:
        daemon.down()


def make(docker: Docker, target: str, **variables: str) -> None:
    """As a user does."""
    given = [f"{key}={value}" for key, value in variables.items()]
    done = subprocess.run(
        ["make", target, *given, "BUILD_OPTIONS=--network host", "DOCKER=/usr/bin/docker"],
        cwd=ROOT,
        env=docker.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def laptop(docker) -> str:
    make(docker, "image-cpu", BASE_IMAGE=BASE)
    return "inplace-ttt:cpu"


@pytest.fixture(scope="module")
def gpu(docker, laptop, tmp_path_factory) -> str:
    """What NVIDIA's image has, as far as the Dockerfile minds: torch, apex and a user of its own."""
    folder = tmp_path_factory.mktemp("stand-in")
    packages = "/usr/local/lib/python3.12/site-packages"
    lacking = "megatron-core hydra-core omegaconf antlr4-python3-runtime wandb datasets"
    (folder / "Dockerfile").write_text(
        f"FROM {laptop} AS packages\nFROM {BASE}\n"
        f"COPY --from=packages /opt/venv/lib/python3.12/site-packages {packages}\n"
        f"RUN useradd --create-home --uid 1000 ubuntu && touch {packages}/amp_C.py && "
        f"python3 -m pip uninstall --quiet --yes {lacking}\n"
    )
    docker.run("build", "--network", "host", "--tag", STAND_IN, str(folder))
    make(docker, "image", BASE_IMAGE=STAND_IN, PACKAGES_IMAGE=BASE)
    return "inplace-ttt:gpu"


def test_the_laptops_image_trains_and_saves_when_it_is_stopped(docker, laptop, tmp_path):
    tmp_path.chmod(0o777)
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "launch/train.py", *SMALL, "train.steps=100000"]
    options = ["--rm", "--network", "host", "--volume", f"{tmp_path}:/workspace/runs", "--name", "stops"]
    log = (tmp_path / "log").open("w")
    container = subprocess.Popen(
        ["/usr/bin/docker", "run", *options, laptop, *command, "run.dir=runs/small"],
        stdout=log, stderr=log, env=docker.environment,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(numbers(tmp_path / "small")) < 4:
        assert container.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    docker.run("stop", "--time", "60", "stops")
    container.wait(timeout=60)
    assert "stopped on request: checkpoint saved at step" in (tmp_path / "log").read_text()
    assert list((tmp_path / "small/checkpoints").glob("step_*"))


def test_the_laptops_image_is_healthy_and_runs_as_nobody_special(docker, laptop):
    assert "uid=1000(trainer)" in docker.run("run", "--rm", "--network", "host", laptop, "id").stdout
    health = docker.run("inspect", "--format", "{{.Config.Healthcheck.Test}}", laptop).stdout
    assert "launch/preflight.py" in health
    done = docker.run("run", "--rm", "--network", "host", laptop, "python", "launch/preflight.py")
    assert "training can run here" in done.stdout
    assert not docker.run("run", "--rm", "--network", "host", laptop, "ls", "-A", "runs", "data").stdout.split()[2:]


def test_the_gpu_image_leaves_what_its_base_brings(docker, gpu):
    done = docker.run("run", "--rm", "--network", "host", gpu)
    assert "training can run here" in done.stdout and "megatron-core" in done.stdout
    versions = {
        image: docker.run("run", "--rm", "--network", "host", image, "python3", "-m", "pip", "list").stdout
        for image in (STAND_IN, gpu)
    }
    lines = {image: set(text.splitlines()) for image, text in versions.items()}
    assert lines[STAND_IN] <= lines[gpu] and any("megatron-core" in line for line in lines[gpu] - lines[STAND_IN])
    assert "uid=1000(trainer)" in docker.run("run", "--rm", "--network", "host", gpu, "id").stdout


def test_a_base_that_does_not_suit_is_refused(docker):
    """Without torch, which the GPU's image must bring."""
    with pytest.raises(AssertionError, match="BASE_IMAGE has no torch"):
        make(docker, "image", BASE_IMAGE=BASE, PACKAGES_IMAGE=BASE)


def test_apex_is_built_where_the_base_has_none(tmp_path):
    """The command, by a Python that only says what it is asked."""
    (tmp_path / "python3").write_text(
        '#!/bin/bash\nif [ "$1" = -c ]; then [ "$2" = "import torch" ]; exit; fi\necho "$APEX_CUDA_EXT" "$@"\n'
    )
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "docker/apex.sh", tmp_path / "wheels"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout.startswith("1 -m pip wheel") and "--no-build-isolation" in done.stdout
