# shellcheck shell=bash
# Sourced by the quickstarts: runs steps that are not done yet, and shows their commands.

# step TITLE RESULT COMMAND...: runs the command, unless the file that it writes last is there.
step() {
    local title=$1 result=$2
    shift 2
    echo
    echo "== $title"
    if [[ -e $result ]]; then
        echo "skipped: ${result#"$ROOT"/} is there"
        return
    fi
    show "$@"
    "$@"
}

show() {
    echo "\$ $*" | sed "s#$ROOT/##g"
}

# table_of SUMMARY: prints what the selection made of each task.
table_of() {
    "$PYTHON" - "$1" <<'PY'
import json
import sys

print(f"{'task':<12}{'records':>9}{'mean gradient norm':>20}{'budget':>8}{'selected':>10}")
for task in json.load(open(sys.argv[1]))["tasks"]:
    value = "left out" if task["value"] is None else f"{task['value']:.3f}"
    budget = "-" if task["budget"] is None else task["budget"]
    print(f"{task['task']:<12}{task['records']:>9}{value:>20}{budget:>8}{task['selected']:>10}")
PY
}
