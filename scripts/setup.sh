#!/usr/bin/env bash
# Set up what the project runs on.
#
#   bash scripts/setup.sh                          make .venv beside this project (Python 3.10 to 3.12), once
#   bash scripts/setup.sh native                   make .venv-native, for models of transformers' own (docs/native.md)
#   PYTHON=$(which python) bash scripts/setup.sh   complete an environment of your own, for example LLaVA's or (with
#                                                  `native`) your trainer's: what is missing is installed, what is
#                                                  there keeps its version
#
# A second call does nothing; a call after an interrupted one completes it. pip's own variables hold, so that
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches the small CPU build of torch on Linux.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    '')
        VENV=.venv REQUIREMENTS=requirements.txt
        WITHOUT_DEPENDENCIES=(llava-torch==1.2.2.post1 traker==0.3.2)
        MODULES="torch, transformers, peft, accelerate, deepspeed, trak, llava.train.train"
        ;;
    native)
        VENV=.venv-native REQUIREMENTS=requirements-native.txt
        WITHOUT_DEPENDENCIES=(torchvision==0.28.0 traker==0.3.2)
        MODULES="torch, tive.models.native, transformers, peft, accelerate, trak"
        ;;
    *) fail "$1 is no environment; name native, or nothing for LLaVA's" ;;
esac
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1

# Imports together what the five steps import, and prints the versions.
check_imports() {
    local said
    said=$("$1" -W ignore -c "import $MODULES" 2>&1) ||
        fail "the environment of $1 does not work (${said##*$'\n'}); if it is $VENV, remove it and run this again"
    echo "ready: $("$1" --version)," "$("$1" -m pip list --format=freeze |
        grep -E '^(torch|transformers|peft|accelerate|deepspeed|llava-torch|traker)==' | paste -sd ' ')"
}

# Completes an environment that is not ours: adds what is missing, holding every installed version where it is.
complete_existing() {
    local missing without_dependencies
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program; name the interpreter of the environment"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip; run \`$PYTHON -m ensurepip\` first"
    { read -r missing; read -r without_dependencies; } < <("$PYTHON" - "$REQUIREMENTS" "${WITHOUT_DEPENDENCIES[@]}" <<'PY'
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

installed = {distribution.name.lower().replace("_", "-") for distribution in distributions()}
needed, _, _ = Path(sys.argv[1]).read_text().partition("# Only the tests need these")
pins = [line.replace(" ", "") for line in needed.splitlines() if "==" in line]
print(*[pin for pin in pins if pin.split("==")[0].lower().replace("_", "-") not in installed])
modules = {"llava-torch": "llava", "traker": "trak"}
print(*[pin for pin in sys.argv[2:] if find_spec(modules.get(name := pin.split("==")[0], name)) is None])
PY
    )
    if [[ -n $missing$without_dependencies ]]; then
        echo "installing into the environment of $PYTHON: $missing $without_dependencies"
        # shellcheck disable=SC2086 # a list of words
        [[ -z $missing ]] || "$PYTHON" -m pip install --quiet $missing --constraint \
            <("$PYTHON" -m pip list --format=freeze | grep -E '^[A-Za-z0-9._-]+==[^ ]+$')
        # shellcheck disable=SC2086
        [[ -z $without_dependencies ]] || "$PYTHON" -m pip install --quiet --no-deps $without_dependencies
    else
        echo "nothing is missing in the environment of $PYTHON"
    fi
    "$PYTHON" -c 'import tive' 2>/dev/null || "$PYTHON" -m pip install --quiet --no-deps --editable .
    check_imports "$PYTHON"
}

# Prints the first Python on the path that the pinned versions have wheels for.
supported_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 with its venv module is on the path; install one (on Debian: apt install" \
        "python3-venv; tokenizers 0.15 has no wheels for other versions), or name an environment: PYTHON=/path/to/python"
}

make_venv() {
    local python stamp=$VENV/complete state
    state=$(cat "$REQUIREMENTS" pyproject.toml scripts/setup.sh | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$state" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
        echo "$VENV is complete: nothing to do"
        return
    fi
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "completing $VENV"
    else
        python=$(supported_python)
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV"
    fi
    rm -f "$stamp"
    echo "installing $REQUIREMENTS (2 GB on disk with torch's CPU build, 5 GB with its CUDA build)"
    # Python compiles what is imported; pip would compile all of it, which takes longer than everything else here.
    "$VENV/bin/python" -m pip install --quiet --no-compile --requirement "$REQUIREMENTS"
    # The lock: both environments may be set up at once, and this builds in the project's folder.
    flock pyproject.toml \
        "$VENV/bin/python" -m pip install --quiet --no-compile --no-deps "${WITHOUT_DEPENDENCIES[@]}" --editable .
    check_imports "$VENV/bin/python"
    echo "$state" >"$stamp"
}

if [[ -n ${PYTHON:-} ]]; then complete_existing; else make_venv; fi
