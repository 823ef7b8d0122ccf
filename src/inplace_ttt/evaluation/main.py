"""Implement ``launch/evaluate.py``."""

from inplace_ttt.config import UserError
from inplace_ttt.environment import World, check_environment
from inplace_ttt.evaluation.arguments import HELP, parse
from inplace_ttt.resilience.exits import fail, tolerate_closed_output


def main(words: list[str]) -> int:
    """Run the command line and return the exit code.

    0: finished. 2: user error. 3: stopped itself. 4: temporary failure. 130: stopped on request; rerun the same command
    to resume.
    """
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    tolerate_closed_output()
    try:
        arguments = parse(words)
        world = World.from_environment()
        check_environment()
        from inplace_ttt.evaluation.evaluate import evaluate
        from inplace_ttt.job import run_job

        output = f"--output '{arguments.output}'"
        return run_job(lambda job: evaluate(arguments, job), world, arguments.timeout_minutes, output=output)
    except UserError as error:
        return fail(f"error: {error}", 2)
    except KeyboardInterrupt:  # before the job handles the signal
        return fail("stopped: nothing was measured yet", 130)
