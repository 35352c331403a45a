#!/usr/bin/env bash
# Does everything hold on this machine's GPU? A table of pass or fail with figures, and one JSON, in some five minutes.
#
#   bash scripts/gpu_check.sh                       on the first GPU
#   bash scripts/gpu_check.sh --llava_7b            also the speed at LLaVA-1.5-7B's shape, random weights (20 GB of memory)
#   bash scripts/gpu_check.sh --wheels DIR          what the environment lacks lies there as wheels; no network is used
#   bash scripts/gpu_check.sh --seconds 240 --output check.json
#
# It needs torch, transformers and peft. What cannot run here, such as a model family whose library is not installed, is
# left out by name. Exit code: 0 everything that ran passed, 1 something failed, 2 nothing could run.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
# shellcheck source=scripts/shell/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/python.sh"

arguments=() wheels=''
while (($# > 0)); do
    case $1 in
        --wheels) wheels=${2:?--wheels wants a folder} && shift ;;
        --wheels=*) wheels=${1#*=} ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ -n $wheels ]]; then
    [[ -d $wheels ]] || fail "the folder of wheels $wheels is not there"
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl ||
        fail "the wheels in $wheels do not fit $PYTHON"
    export PYTHONPATH=$site
fi
lacking=$("$PYTHON" -c 'import importlib.util as util
needed = ("torch", "transformers", "peft", "numpy", "msgspec", "tqdm", "PIL")
print(*(name for name in needed if util.find_spec(name) is None), sep=", ")')
[[ -z $lacking ]] || fail "$PYTHON has no $lacking; install it, or give wheels of it in a folder (--wheels DIR)"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$PYTHON" "$ROOT/scripts/gpu_check/main.py" ${arguments[@]+"${arguments[@]}"}
