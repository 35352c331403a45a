#!/usr/bin/env bash
# Run every check: ruff, shellcheck and the tests. Sets up .venv first where it is missing.
#
#   bash scripts/test.sh                                   everything
#   bash scripts/test.sh tests/test_training.py -k resume  arguments go to pytest
#   PYTHON=$(which python) bash scripts/test.sh            in an environment of your own
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${PYTHON:-} ]] || bash scripts/setup.sh
# shellcheck source=scripts/shell/python.sh
source scripts/shell/python.sh
export PYTHON

# The models are tiny: a second thread costs more than it brings.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
"$PYTHON" -c 'import hypothesis, pytest' 2>/dev/null || fail "$PYTHON lacks pytest or hypothesis; run \`$PYTHON -m pip install pytest hypothesis\`"
if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
    echo "ruff: style"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
fi
shellcheck=$(dirname "$(command -v "$PYTHON")")/shellcheck
if [[ -x $shellcheck ]]; then
    echo "shellcheck: the shell scripts"
    "$shellcheck" --external-sources ./*.sh scripts/*.sh scripts/*.sbatch .ci/run
fi
echo "pytest: the tests"
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    parallel=(--numprocesses 2 --dist loadfile)
fi
"$PYTHON" -m pytest --quiet --durations 5 "${parallel[@]}" "$@"
