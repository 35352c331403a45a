# shellcheck shell=bash
# Sourced by the quickstarts and the experiment: runs steps that are not done yet, and shows their commands and settings.
SECONDS=0

# begin FOLDER ENVIRONMENT ARGUMENT: makes the environment (`native`, or '' for LLaVA's) where PYTHON names none, and sets
# ROOT, PYTHON and folder: the argument, or FOLDER in the project's.
begin() {
    ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    [[ ${3:-} != -* ]] || fail "$3 is no folder; \`bash $0 --help\` shows what can be given"
    # shellcheck disable=SC2034 # the scripts use it
    folder=$(realpath -m "${3:-$ROOT/$1}")
    cd "$ROOT" || exit
    if [[ -z ${PYTHON:-} ]]; then
        bash scripts/setup.sh ${2:+"$2"}
        PYTHON=$ROOT/.venv${2:+-$2}/bin/python
    fi
    # shellcheck source=scripts/shell/python.sh
    source scripts/shell/python.sh
    export PYTHON HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore
}

# setting NAME=VALUE...: exports the variables, and shows it.
setting() {
    # shellcheck disable=SC2163 # the arguments are NAME=VALUE
    export "$@"
    show export "$@"
}

# step TITLE RESULT COMMAND...: runs the command, unless the file that it writes last is there.
step() {
    echo
    echo "== $1"
    if [[ -e $2 ]]; then
        echo "skipped: ${2#"$ROOT"/} is there"
        return
    fi
    show "${@:3}"
    "${@:3}"
}

show() {
    echo "\$ $*" | sed "s#$ROOT/##g"
}

# The steps of both quickstarts that no trainer is in; `subset` is the path of the selected records, less `.json`.
draw_data() {
    step "Data: records of seven tasks and their images" "$folder/data.json" \
        "$PYTHON" scripts/quickstart/data.py --folder "$folder"
}

sample_warm_up() {
    step "Step 1: sample the warm-up data" "$folder/warm_up.json" \
        "$PYTHON" select_warm_up_data.py --source_path "$folder/data.json" --target_path "$folder/warm_up.json" \
        --sample_ratio 0.25
}

select_subset() {
    subset=$folder/selected/Tive_q_0.001_p_0.15
    step "Step 4: select 15% of the data" "${subset}_summary.json" \
        "$PYTHON" select_data_TIVE.py --data_path "$folder/data.json" --gradient_path "$folder/gradients" \
        --save_path "$folder/selected"
}

write_report() {
    step "Report: what was selected, and why, on one page" "$folder/selected/report.html" \
        "$PYTHON" scripts/report.py "$folder/selected"
    echo
    echo "== Done in $SECONDS s: see $folder/selected/report.html"
}
