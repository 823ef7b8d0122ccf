"""A real Docker daemon for the tests, and a base image out of Debian's packages and this machine's Python.

Registries of images are out of reach of many test machines; the Dockerfiles take their base by build argument.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("dockerd", "mmdebstrap", "iptables")
CLIENT = "/usr/bin/docker"
LIBRARIES = "ca-certificates,libssl3,libffi8,zlib1g,libbz2-1.0,liblzma5,libsqlite3-0,libreadline8,libncursesw6,libuuid1"


def why_not() -> str | None:
    """What keeps Docker from being started here; None: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if not Path(CLIENT).exists():
        lacking.append(CLIENT)
    return f"needs {', '.join(lacking)}" if lacking else None


class Docker:
    """A daemon of its own, without a bridge: containers and builds use the host's network."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_BUILDKIT": "1"}

    def up(self) -> None:
        self.folder.mkdir(parents=True)
        log = (self.folder / "log").open("w")
        self.daemon = subprocess.Popen(
            ["dockerd", "--data-root", self.folder / "data", "--exec-root", self.folder / "exec", "--pidfile",
             self.folder / "pid", "--host", f"unix://{self.folder}/docker.sock", "--storage-driver", "overlay2",
             "--iptables=false", "--ip6tables=false", "--bridge=none", "--group", "root"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while self.run("version", check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.2)

    def down(self) -> None:
        for container in self.run("ps", "--quiet", check=False).stdout.split():
            self.run("kill", container, check=False)
        self.daemon.terminate()
        self.daemon.wait(timeout=30)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((path for path in mounts if path.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", mount], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *arguments: str, check: bool = True, timeout: float = 1200) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [CLIENT, *arguments], capture_output=True, text=True, env=self.environment, timeout=timeout
        )
        assert not check or done.returncode == 0, f"docker {arguments[0]}: {done.stderr[-3000:]}{done.stdout[-3000:]}"
        return done

    def make_base(self, tag: str, folder: Path) -> None:
        """An image with Python 3.12 as this machine has it, and how this machine's pip reaches its index."""
        folder.mkdir()
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=apt", f"--include={LIBRARIES}", "bookworm", folder / "base.tar"],
            check=True, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        shutil.copytree(sys.base_prefix, folder / "python", symlinks=True, ignore=shutil.ignore_patterns("test", "*.a"))
        shutil.rmtree(folder / "python/lib/python3.12/site-packages")
        (folder / "python/lib/python3.12/site-packages").mkdir()
        certificates = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))
        shutil.copy(certificates, folder / "host.crt")
        (folder / "pip.conf").write_text("[global]\ncert = /etc/ssl/host.crt\n")
        (folder / "Dockerfile").write_text(
            "FROM scratch\nADD base.tar /\nCOPY python /usr/local\nCOPY host.crt /etc/ssl/\nCOPY pip.conf /etc/\n"
            "RUN ldconfig && ln -sf python3.12 /usr/local/bin/python3 && python3 -m ensurepip\n"
        )
        self.run("build", "--network", "host", "--tag", tag, str(folder))
