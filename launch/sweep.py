"""Train one run for each combination of values, and compare their held-out losses.

python launch/sweep.py recipe=smollm2_135m_ttt ttt.chunk_size=256,512,1024 train.steps=135
python launch/sweep.py recipe=tiny_ttt ttt.eta=0.3,1,3 optim.lr=5e-4,1e-3        # all six combinations
python launch/sweep.py --jobs 2 recipe=... ttt.eta=0.3,1,3                       # two runs at once
python launch/sweep.py --submit="--nodes 1 --time 4:00:00" recipe=... ttt.eta=0.3,1,3         # jobs of Slurm
python launch/sweep.py --report recipe=... ttt.eta=0.3,1,3                       # only the table, of what there is

Runs are in FOLDER/key=value. The same command skips runs that are done and resumes others. Commas in brackets and
quotes do not separate values. Writes FOLDER/sweep.json, sweep.md and sweep.png.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError
from inplace_ttt.files import user_path
from inplace_ttt.training import sweep
from inplace_ttt.training.compose import Recipes, compose_config, to_config, with_own

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE[,VALUE...]", help="recipe=NAME and other keys")
    parser.add_argument("--folder", type=Path, help="folder of the sweep (runs/sweep_RECIPE)")
    parser.add_argument("--config-dir", metavar="DIR", help="your own recipes, as DIR/recipe/NAME.yaml")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="processes (GPUs) of each run (1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (1)")
    parser.add_argument("--submit", metavar="OPTIONS", help="submit the runs with these options of launch/submit.py")
    parser.add_argument("--report", action="store_true", help="train nothing, and show the results that exist")
    parser.add_argument("--dry-run", action="store_true", help="check all runs, and print their commands")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    return run_command(lambda: run(arguments), stopped="stopped: the same command resumes the sweep")


def run(arguments: argparse.Namespace) -> int:
    """Run or report a sweep and return the exit code: 0, or 1 if a run failed."""
    if arguments.nproc_per_node < 1 or arguments.jobs < 1:
        raise UserError(f"--nproc-per-node {arguments.nproc_per_node} --jobs {arguments.jobs}: use 1 or more of each")
    if arguments.submit is not None and arguments.jobs > 1:
        raise UserError(f"--jobs {arguments.jobs} does not apply to --submit: Slurm decides what runs at once")
    points = sweep.points(arguments.overrides)
    recipe = next((one.partition("=")[2] for one in arguments.overrides if one.startswith("recipe=")), "runs")
    folder = user_path(arguments.folder or Path(f"runs/sweep_{recipe}"))
    recipes = with_own(ROOT / "recipes", arguments.config_dir)
    steps = {point.name: check(point, recipes, arguments) for point in points}
    commands = {point.name: command(point, folder, arguments) for point in points}
    if arguments.dry_run:
        print("\n".join(map(shlex.join, commands.values())))
        return 0
    if arguments.report and not folder.is_dir():
        raise UserError(f"--report: '{folder}' does not exist: start the sweep without --report, or name its --folder")
    console = Console(width=None if sys.stdout.isatty() else 140)
    failed: set[str] = set()
    if not arguments.report:
        folder.mkdir(parents=True, exist_ok=True)
        waiting = [point.name for point in points if not is_done(point, folder / point.name, steps[point.name])]
        if arguments.submit is not None:
            for name in waiting:
                if subprocess.run(commands[name], cwd=ROOT).returncode:
                    raise UserError(f"{name} was not submitted: see above")
            console.print(f"submitted {len(waiting)} runs; --report shows their results", highlight=False)
            return 0
        failed = train(waiting, commands, folder, arguments, console)
    results = [
        sweep.read_result(point, folder / point.name, steps[point.name], point.name in failed) for point in points
    ]
    sweep.write(folder, shlex.join(["python", "launch/sweep.py", *sys.argv[1:]]), results)
    console.print(sweep.table(results))
    for name in sorted(failed):
        console.print(f"{name} failed: see {folder / name}.log", highlight=False, soft_wrap=True)
    console.print(f"written: {folder}/sweep.json, sweep.md, sweep.png", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def check(point: sweep.Point, recipes: Recipes, arguments: argparse.Namespace) -> int:
    """Check the configuration of a run and return train.steps. Raises UserError that names the run."""
    from inplace_ttt.validation import check_hardware, validate

    try:
        config = to_config(compose_config(point.overrides, recipes))
        if arguments.submit is None:  # launch/submit.py checks the layout of its nodes
            validate(config, arguments.nproc_per_node)
            check_hardware(config)
    except UserError as error:
        raise UserError(f"{point.name}: {error}") from error
    return config.train.steps


def command(point: sweep.Point, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the command that trains a run."""
    own = [f"run.dir={folder / point.name}", f"run.name={folder.name}_{point.name}"]
    if arguments.config_dir is not None:
        own += [f"--config-dir={os.path.abspath(arguments.config_dir)}"]
    if arguments.submit is not None:
        own[0] = f"run.dir={(folder / point.name).absolute()}"
        options = shlex.split(arguments.submit)
        return [sys.executable, str(ROOT / "launch/submit.py"), *options, *point.overrides, *own]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc-per-node={arguments.nproc_per_node}", str(ROOT / "launch/train.py")]
    return [*start, *point.overrides, *own]


def is_done(point: sweep.Point, run: Path, steps: int) -> bool:
    """Return whether a run has done all steps and has a checkpoint."""
    return sweep.read_result(point, run, steps).state == "done" and any(run.glob("checkpoints/step_*"))


def train(
    waiting: list[str], commands: dict[str, list[str]], folder: Path, arguments: argparse.Namespace, console: Console
) -> set[str]:
    """Train the waiting runs, ``--jobs`` at once, each on GPUs of its own. Return the names of those that failed."""
    slots, failed, running = list(range(arguments.jobs)), set(), {}
    threads = max(1, len(os.sched_getaffinity(0)) // (arguments.jobs * arguments.nproc_per_node))
    waiting = list(waiting)
    total = len(waiting)
    try:
        while waiting or running:
            while waiting and slots:
                name, slot = waiting.pop(0), slots.pop(0)
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **gpus(slot, arguments)}
                with (folder / f"{name}.log").open("w") as log:
                    running[name] = slot, subprocess.Popen(commands[name], stdout=log, stderr=log, env=environment)
                console.print(
                    f"[{total - len(waiting)}/{total}] {name}: log {folder / name}.log", markup=False, soft_wrap=True
                )
            time.sleep(0.5)
            for name, (slot, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    slots.append(slot)
                    if process.returncode:
                        failed.add(name)
                        console.print(f"{name} failed", highlight=False)
    finally:
        for _, process in running.values():
            process.terminate()  # the run saves a checkpoint
        for _, process in running.values():
            process.wait()
    return failed


def gpus(slot: int, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment that gives the runs of a slot their own GPUs. Raises UserError if there are too few."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return {}
    if arguments.jobs * arguments.nproc_per_node > count:
        raise UserError(
            f"--jobs {arguments.jobs} with --nproc-per-node {arguments.nproc_per_node} needs "
            f"{arguments.jobs * arguments.nproc_per_node} GPUs, and there are {count}: use fewer"
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(count)]
    first = slot * arguments.nproc_per_node
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + arguments.nproc_per_node])}


if __name__ == "__main__":
    sys.exit(main())
