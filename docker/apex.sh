#!/usr/bin/env bash
# Build a wheel of NVIDIA's apex in a folder, unless Python has it: apex.sh FOLDER. (On the public registry the name
# belongs to something else.)
set -euo pipefail
folder=$1
# A state of apex that builds with CUDA 13 and torch 2.11
commit=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
mkdir -p "$folder"
if ! python3 -c 'import torch'; then
  echo "apex: BASE_IMAGE has no torch: it must bring one for its CUDA, as NVIDIA's PyTorch images do" >&2
  exit 1
fi
if python3 -c 'import torch, amp_C' 2>/dev/null; then
  echo "apex: the base image has it"
  exit 0
fi
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${APEX_PARALLEL_BUILD:-4} NVCC_APPEND_FLAGS="--threads 4"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
python3 -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$folder" \
  "git+https://github.com/NVIDIA/apex@$commit"
