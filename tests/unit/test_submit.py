"""What launch/submit.py would have Slurm do, and what it refuses before that."""

from functools import partial

import pytest

from launching import run_launch_script

submit = partial(run_launch_script, "submit.py")

CURRICULUM = ["recipe=qwen3_4b_ttt", "parallel=h100", "checkpoint.load=null"]


def test_dry_run_shows_both_stages_and_the_script():
    done = submit("--nodes", "2", "--time", "1:00:00", "--container", "image.sqsh", "--sbatch=--qos=high", *CURRICULUM,
                  "--then", "recipe=qwen3_4b_ttt_128k parallel=h100", "--dry-run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, *script = done.stdout.splitlines()
    assert "--nodes=2 --gpus-per-node=8 --time=1:00:00 --exclusive --mem=0 --qos=high" in first
    assert "INPLACE_TTT_CONTAINER=image.sqsh" in first and first.endswith(" ".join(CURRICULUM))
    assert (
        "--dependency=afterok:JOB_OF_qwen3_4b_ttt --kill-on-invalid-dep=yes" in second
        and "recipe=qwen3_4b_ttt_128k" in second
    )
    assert "#!/usr/bin/env bash" in script


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "3", *CURRICULUM, "--dry-run"], "24 data-parallel ranks: use 144"),
        (["--nodes", "0", *CURRICULUM, "--dry-run"], "use 1 or more"),
        (["--time", "garbage", *CURRICULUM, "--dry-run"], "--time 'garbage' is not a time limit"),
        (["--partition", "", *CURRICULUM, "--dry-run"], "--partition '' cannot be used"),
        (["--sbatch", "x", *CURRICULUM, "--dry-run"], "is not an sbatch option"),
        ([*CURRICULUM, "--then", "run.dir='a", "--dry-run"], "close its quotes"),
        (["recipe=qwen3_4b", "--dry-run"], "did you mean recipe=qwen3_4b_ttt?"),
        (
            ["--nodes", "2", *CURRICULUM, "--then", "recipe=qwen3_4b_ttt_128k ttt.chunk=1", "--dry-run"],
            "ttt.chunk_size?",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_it_queues(arguments, said):
    done = submit(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
