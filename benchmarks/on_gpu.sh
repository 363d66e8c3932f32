#!/usr/bin/env bash
# What does one GPU measure in eight minutes?
#
#   benchmarks/on_gpu.sh pack            where lit_ft is installed: fill benchmarks/packed
#   benchmarks/on_gpu.sh                 on the machine with the GPU: run benchmarks/on_gpu.py
#   benchmarks/on_gpu.sh --output DIR    the same; all other arguments are passed on
#
# The machine with the GPU needs torch, and no network. Where it has not all that lit_ft depends
# on, in the right versions, what was packed is unpacked into a temporary folder and used instead.
# PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
packed=$PWD/benchmarks/packed

if [ "${1:-}" = pack ]; then
  shift
  export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
  exec "$python" -m support.pack "$@"
fi

paths=$PWD
if ! "$python" benchmarks/support/unmet.py && [ -d "$packed" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$packed"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$site"
  done
  # Ahead of what the machine has, so that the versions go with each other.
  paths=$paths:$packed/start:$site
  export LIT_FT_TOKENIZER=$packed/tokenizer
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}"
"$python" benchmarks/support/unmet.py || echo "going on without them"
"$python" benchmarks/on_gpu.py "$@"
