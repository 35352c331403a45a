#!/usr/bin/env bash
# Does it choose well? The experiment of docs/experiment.md: trains a tiny LLaVA on many selections of the same data,
# and compares their held-out losses. Tables and plots are in FOLDER/results.
#
#   bash scripts/experiment.sh [FOLDER]            the full one, into experiment/: hours on a CPU
#   bash scripts/experiment.sh --small [FOLDER]    a small variant, into experiment-small/: shows that it works
#
# Sets up .venv first where it is missing. What is there already is skipped: remove a folder to make it anew.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
small=()
if [[ ${1:-} == --small ]]; then
    small=(--small)
    shift
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(realpath -m "${1:-$ROOT/experiment${small:+-small}}")
cd "$ROOT"
[[ -n ${PYTHON:-} ]] || bash scripts/setup.sh
# shellcheck source=scripts/shell/python.sh
source scripts/shell/python.sh

# The model is tiny: a second thread costs more than it brings.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore
exec "$PYTHON" -m scripts.experiment.run "${small[@]}" "$folder"
