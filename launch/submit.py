"""Check the configuration of a run and submit it to Slurm.

python launch/submit.py --nodes 2 --time 24:00:00 recipe=qwen3_4b_ttt parallel=h100
python launch/submit.py --nodes 2 recipe=qwen3_4b_ttt parallel=h100 \\
  --then "recipe=qwen3_4b_ttt_128k parallel=h100"

--dry-run prints the commands instead of submitting them. The job (launch/slurm/train.sbatch) saves a checkpoint before
its time limit and requeues itself; it also requeues itself after a crash. Each --then run starts after the previous run
is done, and is cancelled if that fails permanently. (These are separate jobs with dependencies and not tasks of a job
array, because a task that requeues itself would let the next one start.)
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path("launch/slurm/train.sbatch")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="recipe=NAME and other keys")
    parser.add_argument(
        "--config-dir", type=os.path.abspath, metavar="DIR", help="your own recipes, as DIR/recipe/NAME.yaml"
    )
    parser.add_argument(
        "--then", action="append", default=[], metavar="KEYS", help="keys of a run to start after this one"
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs and processes per node (8)")
    parser.add_argument(
        "--time", help="time limit per job start, such as 24:00:00; the job requeues itself and resumes"
    )
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument("--container", metavar="IMAGE", help="container image to run in")
    parser.add_argument(
        "--container-runtime", choices=["pyxis", "apptainer"], default="pyxis", help="container runtime (pyxis)"
    )
    parser.add_argument("--mounts", help="container mounts in addition to the checkout, such as /data:/data")
    parser.add_argument("--shared", action="store_true", help="share nodes with other jobs (default: exclusive)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other sbatch option")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and submit nothing")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    os.chdir(ROOT)  # the job runs there: relative paths have the same meaning
    from inplace_ttt.config import UserError
    from inplace_ttt.files import user_path

    try:
        check_options(arguments)
        runs = [arguments.overrides, *(split(keys) for keys in arguments.then)]
        if arguments.config_dir is not None:
            runs = [[f"--config-dir={arguments.config_dir}", *overrides] for overrides in runs]
        if arguments.nodes < 1 or arguments.gpus_per_node < 1:
            raise UserError(
                f"--nodes {arguments.nodes} --gpus-per-node {arguments.gpus_per_node}: use 1 or more of each"
            )
        configs = [check(overrides, arguments, first=number == 0) for number, overrides in enumerate(runs)]
        if not arguments.dry_run and shutil.which("sbatch") is None:
            raise UserError("sbatch was not found: run this on a Slurm login node, or use --dry-run")
        before, environment = None, of_the_job(arguments)
        for config, overrides in zip(configs, runs, strict=True):
            command = sbatch(config, overrides, arguments, before)
            if arguments.dry_run:
                print(shlex.join([*(f"{key}={value}" for key, value in environment.items()), *command]))
                before = f"JOB_OF_{config.run.name}"
            else:
                folder = user_path(config.run.dir)
                folder.mkdir(parents=True, exist_ok=True)
                before = submit(command, environment)
                print(f"{config.run.name}: job {before}, log {folder}/slurm-{before}.log")
        if arguments.dry_run:
            print(f"\n# {SCRIPT}\n{(ROOT / SCRIPT).read_text()}", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UserError if an option is empty or Slurm would reject it."""
    from inplace_ttt.config import UserError

    time = arguments.time
    if time is not None and not re.fullmatch(r"UNLIMITED|\d+|(\d+-)?\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+", time):
        raise UserError(
            f"--time '{time}' is not a time limit: use hours:minutes:seconds such as 24:00:00, or days-hours"
        )
    for name in ("partition", "account", "container", "mounts"):
        value = getattr(arguments, name)
        if value is not None and (not value.strip() or not value.isprintable() or " " in value):
            raise UserError(f"--{name} '{value}' cannot be used: give one word, or omit the option")
    for option in arguments.sbatch:
        if not option.startswith("-") or not option.isprintable():
            raise UserError(f"--sbatch {option!r} is not an sbatch option: use one such as --sbatch=--qos=high")


def split(keys: str) -> list[str]:
    """Return the words of --then. Raises UserError if a quote is not closed."""
    from inplace_ttt.config import UserError

    try:
        return shlex.split(keys)
    except ValueError as error:
        raise UserError(f"--then {keys!r} is not understood ({error}): close its quotes") from error


def check(overrides: list[str], arguments: argparse.Namespace, first: bool):
    """Return the run's configuration. Raises UserError if it is invalid for the number of processes.

    ``first``: False for a run of --then, whose checkpoint.load an earlier run may still have to write.
    """
    from inplace_ttt.files import user_path
    from inplace_ttt.training.compose import compose_config, split_config_dir, to_config
    from inplace_ttt.validation import validate

    config = to_config(compose_config(*split_config_dir(overrides, ROOT / "recipes")))
    load = config.checkpoint.load
    if load is not None and (not first or (arguments.dry_run and not user_path(load).is_dir())):
        config.checkpoint.load = None  # it may not exist yet, or not on this machine
        if first:
            print(
                f"assumed: checkpoint.load='{load}' does not exist here and will exist when the run starts",
                file=sys.stderr,
            )
    validate(config, arguments.nodes * arguments.gpus_per_node)
    return config


def of_the_job(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables that launch/slurm/environment.sh reads."""
    told = {"INPLACE_TTT_ROOT": str(ROOT), "INPLACE_TTT_PROCESSES": str(arguments.gpus_per_node)}
    if arguments.container:
        told |= {
            "INPLACE_TTT_CONTAINER": arguments.container,
            "INPLACE_TTT_CONTAINER_RUNTIME": arguments.container_runtime,
            "INPLACE_TTT_MOUNTS": arguments.mounts or "",
        }
    return told


def sbatch(config, overrides: list[str], arguments: argparse.Namespace, before: str | None) -> list[str]:
    """Return the sbatch command of a run. ``before``: ID of the job that must be done first, if any."""
    from inplace_ttt.files import user_path

    options = {
        "job-name": config.run.name,
        "output": f"{user_path(config.run.dir)}/slurm-%j.log",
        "nodes": arguments.nodes,
        "gpus-per-node": arguments.gpus_per_node,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "dependency": before and f"afterok:{before}",
        "kill-on-invalid-dep": before and "yes",  # cancel a job that can never start
    }
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    if not arguments.shared:  # otherwise Slurm gives the single task of a node one core
        given += ["--exclusive", "--mem=0"]
    return ["sbatch", "--export=ALL", *given, *arguments.sbatch, str(ROOT / SCRIPT), *overrides]


def submit(command: list[str], environment: dict[str, str]) -> str:
    """Submit a job and return its ID. Raises UserError if Slurm rejects it."""
    from inplace_ttt.config import UserError, one_line

    command = [command[0], "--parsable", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise UserError(f"Slurm rejected the job: {one_line(RuntimeError(done.stderr))}")
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    sys.exit(main())
