#!/usr/bin/env bash
# Build a wheel of NVIDIA's apex in a folder, unless it is installed: apex.sh FOLDER. (The package apex on PyPI is a
# different project.)
set -euo pipefail
folder=$1
# A commit of apex that builds with CUDA 13 and torch 2.11
commit=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
mkdir -p "$folder"
if ! python3 -c 'import torch'; then
  echo "apex: BASE_IMAGE has no torch: use an image with torch for its CUDA version, such as NVIDIA's PyTorch images" >&2
  exit 1
fi
if python3 -c 'import torch, amp_C' 2>/dev/null; then
  echo "apex: already in the base image"
  exit 0
fi
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${APEX_PARALLEL_BUILD:-4} NVCC_APPEND_FLAGS="--threads 4"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
python3 -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$folder" \
  "git+https://github.com/NVIDIA/apex@$commit"
