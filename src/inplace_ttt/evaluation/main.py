"""``launch/evaluate.py``: from the command line to tables, samples and pictures in a folder."""

from inplace_ttt.config import UserError
from inplace_ttt.environment import World, check_environment
from inplace_ttt.evaluation.arguments import HELP, parse
from inplace_ttt.resilience.exits import fail, tolerate_closed_output


def main(words: list[str]) -> int:
    """Run the command line and return the exit code: 0 all is measured, 2 the user must change something, 3 stopped
    itself, 4 something failed that may pass, 130 stopped as asked: the same command goes on."""
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
    except KeyboardInterrupt:  # before the job listens for it
        return fail("stopped: nothing was measured yet", 130)
