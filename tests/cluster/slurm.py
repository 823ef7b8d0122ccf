"""Real Slurm on one machine: hosts that share nothing but the disk, each with its own network, name and processes.

A host is a network namespace on a common bridge, in which one process, the first of a process namespace, starts the
daemons: killing it is pulling the host's plug.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
GPUS = 2  # a node; devices that do nothing


def why_not() -> str | None:
    """What keeps Slurm from being started here; None: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    return f"needs {', '.join(lacking)}" if lacking else None


class Slurm:
    """A controller, ``ctl``, and nodes ``node1`` .. ``nodeN``."""

    def __init__(self, folder: Path, nodes: int, cores: int = 4):
        self.folder, self.tag = folder, f"tt{os.getpid() % 10000}"
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.hosts = {"ctl": "10.78.0.100", **{name: f"10.78.0.{n + 1}" for n, name in enumerate(self.nodes)}}
        self.plugs: dict[str, subprocess.Popen] = {}
        for name in ("run", "state", "log", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "run").chmod(0o755)
        folder.chmod(0o755)
        key = folder / "run" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for number in range(GPUS):
            subprocess.run(["mknod", str(folder / f"gpu{number}"), "c", "1", "3"], check=True)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "slurm.conf").write_text(self._configuration(cores))

    def _configuration(self, cores: int) -> str:
        folder = self.folder
        settings = dict(
            ClusterName="test",
            SlurmctldHost="ctl",
            SlurmUser="root",
            SlurmdUser="root",
            AuthType="auth/munge",
            CredType="cred/munge",
            AuthInfo=f"socket={folder}/run/munge.sock,cred_expire=5",
            StateSaveLocation=f"{folder}/state",
            SlurmdSpoolDir=f"{folder}/spool/%n",
            SlurmctldPidFile=f"{folder}/run/slurmctld.pid",
            SlurmdPidFile=f"{folder}/run/slurmd.%n.pid",
            SlurmctldLogFile=f"{folder}/log/slurmctld.log",
            SlurmdLogFile=f"{folder}/log/slurmd.%n.log",
            ProctrackType="proctrack/linuxproc",
            TaskPlugin="task/none",
            JobAcctGatherType="jobacct_gather/none",
            AccountingStorageType="accounting_storage/none",
            SwitchType="switch/none",
            MpiDefault="none",
            SelectType="select/cons_tres",
            SelectTypeParameters="CR_Core",
            SlurmdParameters="config_overrides",
            SchedulerParameters="sched_interval=2,bf_interval=2,batch_sched_delay=0",
            ReturnToService=2,
            JobRequeue=1,
            SlurmdTimeout=10,
            SlurmctldTimeout=10,
            InactiveLimit=0,
            KillWait=5,
            WaitTime=10,
            GresTypes="gpu",
        )
        lines = [f"{key}={value}" for key, value in settings.items()]
        for name in self.nodes:
            lines.append(
                f"NodeName={name} NodeAddr={self.hosts[name]} CPUs={cores} Sockets=1 CoresPerSocket={cores} "
                f"ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"

    def up(self) -> None:
        switch = self._space("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        names = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.hosts.items())
        for name, address in self.hosts.items():
            space, cable = self._space(name), f"to-{name}"
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", cable, "netns", switch)
            _ip("-n", switch, "link", "set", cable, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            hosts = Path("/etc/netns") / space / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(names)
        run = self.folder / "run"
        munge = (
            f"munged --foreground --force --key-file={run}/munge.key --socket={run}/munge.sock --num-threads=2 "
            f"--pid-file={run}/munged.pid --log-file={self.folder}/log/munged.log --seed-file={run}/munge.seed"
        )
        ready = f"while [ ! -S {run}/munge.sock ]; do sleep 0.05; done"
        self._boot("ctl", f"{munge} & {ready}; slurmctld -D -i -f {self.folder}/slurm.conf")
        for name in self.nodes:
            self.boot(name)
        self.wait(lambda: self._states().count("idle") == len(self.nodes), 30)

    def boot(self, name: str) -> None:
        """Switch a node on."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._boot(name, f"exec slurmd -D -N {name} -f {self.folder}/slurm.conf")

    def crash(self, name: str) -> None:
        """Pull a node's plug."""
        plug = self.plugs.pop(name)
        os.killpg(plug.pid, signal.SIGKILL)
        plug.wait()

    def cut(self, name: str) -> None:
        """Pull a node's network cable."""
        _ip("-n", self._space(name), "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """Plug the cable in again."""
        _ip("-n", self._space(name), "link", "set", "eth0", "up")

    def processes(self, name: str, command: str) -> list[int]:
        """Processes of a host whose command line has ``command`` in it."""
        listed = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True).stdout
        return [int(pid) for pid in listed.split() if command in _command_line(pid)]

    def down(self) -> None:
        for name in list(self.plugs):
            self.crash(name)
        for name in (*self.hosts, "switch"):
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._space(name), ignore_errors=True)

    def on(self, name: str, *command: str, environment: dict | None = None) -> subprocess.CompletedProcess:
        """Run a command on a host."""
        inside = ["unshare", "--uts", "bash", "-c", f'hostname {name}; exec "$@"', "_", *command]
        variables = {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf", **(environment or {})}
        return subprocess.run(
            ["ip", "netns", "exec", self._space(name), *inside], capture_output=True, text=True, env=variables
        )

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job; empty once it has forgotten it."""
        words = self.on("ctl", "scontrol", "show", "job", "-o", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition, seconds: float):
        """What the condition finds, once it finds something."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1500:] for path in (self.folder / "log").glob("*"))
                raise AssertionError(f"nothing happened in {seconds} s; Slurm's logs end with\n{logs}")
            time.sleep(0.3)
        return found

    def _states(self) -> list[str]:
        return self.on("ctl", "sinfo", "-h", "-N", "-o", "%T").stdout.split()

    def _space(self, name: str) -> str:
        return f"{self.tag}{name}"

    def _boot(self, name: str, script: str) -> None:
        log = (self.folder / "log" / f"{name}.out").open("a")
        inside = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.plugs[name] = subprocess.Popen(
            ["ip", "netns", "exec", self._space(name), *inside, "bash", "-c", f"hostname {name}; {script}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf"},
            start_new_session=True,
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has ended
        return ""
