#!/bin/sh
# Check capsexp on this machine's CUDA card in at most 10 minutes: tests of the kernels, their parity with float64,
# speed against plain and compiled PyTorch, and a 3-minute training. Writes on_a_gpu.json and on_a_gpu.md.
#
#   scripts/on_a_gpu.sh [FOLDER] [--cpu] [--minutes N] [--only PART …]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] || make -C "$root" install
export PYTHONPATH="$root"
exec "$root/.venv/bin/python" -P -m scripts.on_a_gpu "$@"
