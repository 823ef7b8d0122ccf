"""Run ``vllm serve`` on a GPU if there is one, else on a CPU, as engine.py does: server.py ARGUMENTS..."""

import sys

import torch
from engine import interpret_kernels

if not torch.cuda.is_available():  # also in the processes that vLLM starts: they import this file
    interpret_kernels()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    main()
