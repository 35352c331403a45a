# shellcheck shell=bash
# Sourced by the other scripts: sets ROOT, the project's folder, and PYTHON, the interpreter that runs it:
# $PYTHON where it is set, else the project's .venv, else the python3 on the path. Packages come from its environment
# alone, not from an inherited PYTHONPATH, which may lead to another LLaVA.
unset PYTHONPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/shell/help.sh
source "$ROOT/scripts/shell/help.sh" ''

if [[ -n ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program; name an interpreter, or unset PYTHON to use .venv"
elif [[ -x $ROOT/.venv/bin/python ]]; then
    PYTHON=$ROOT/.venv/bin/python
else
    PYTHON=python3
fi

# run_module MODULE ARGUMENT...: as python -m, but without the working folder among the places to import from.
run_module() {
    "$PYTHON" "$ROOT/scripts/shell/run_module.py" "$@"
}
