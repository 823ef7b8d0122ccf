"""Train without a checkout: torchrun --nproc-per-node N -m inplace_ttt.train recipe=NAME [key=value ...]"""

import sys
from pathlib import Path

from inplace_ttt.resilience.exits import leave
from inplace_ttt.training.main import main

if __name__ == "__main__":  # checkpoint writer processes import this file again
    leave(main(sys.argv[1:], Path(__file__).with_name("recipes")))
