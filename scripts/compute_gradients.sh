#!/usr/bin/env bash
# Step 3 over all GPUs of this machine: one process a GPU, each computes one open chunk after the other.
#
#   bash scripts/compute_gradients.sh --input_file data.json --image_folder images \
#       --model_path checkpoints/reference-lora --model_base vicuna-7b-v1.5 --output_file features
#
# All arguments go to compute_gradient_features.py. Variables:
#   GPUS="0 1 2"     ids of the GPUs (default: all that torch sees; without one, "cpu"). "cpu cpu" runs two processes.
#   NUM_CHUNKS=16    number of chunks (default: one a GPU). More, and smaller, leave no GPU idle at the end.
#   STATUS_SECONDS   how often the progress over all chunks is shown (default: 30)
#
# Each process's output goes to DIR/log_HOST_N.txt. The same call on other machines of one file system, with the same
# NUM_CHUNKS, helps along: a chunk is computed by one process, and one of a lost process is taken over. The same call
# continues after any stop. Ctrl-C or SIGTERM lets each process finish its window; a second Ctrl-C does not wait. With
# --dry_run N one process computes N records, and prints what the whole costs.
# Exit code: 0 all chunks are complete, 1 some are not, 130 or 143 stopped.
set -uo pipefail
# shellcheck source=scripts/shell/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/python.sh"

# shellcheck source=scripts/shell/help.sh
source "$ROOT/scripts/shell/help.sh" "${1:---help}"
folder='' previous=''
for argument in "$@"; do
    [[ $previous != --output_file ]] || folder=$argument
    case $argument in
        --output_file=*) folder=${argument#*=} ;;
        --num_chunks* | --chunk_idx*) fail "$argument: set the number of chunks with NUM_CHUNKS" ;;
        *) ;;
    esac
    previous=$argument
done
[[ -n $folder ]] || fail "name the feature folder with --output_file"
mkdir -p "$folder" || fail "cannot make $folder"

GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES:-}}
if [[ -z $GPUS ]]; then
    read -r count _ < <("$PYTHON" "$ROOT/scripts/shell/gpus.py") || fail "$PYTHON cannot tell the GPUs; name them with GPUS"
    GPUS=$(seq -s ' ' 0 $((count - 1)))
fi
read -ra gpus <<<"${GPUS//,/ }"
((${#gpus[@]} > 0)) || gpus=(cpu)
NUM_CHUNKS=${NUM_CHUNKS:-${#gpus[@]}}
[[ $NUM_CHUNKS =~ ^[1-9][0-9]*$ ]] || fail "NUM_CHUNKS=$NUM_CHUNKS is not a positive number"
export PYTHONUNBUFFERED=1
if [[ " $* " == *" --dry_run"* ]]; then
    if [[ ${gpus[0]} == cpu ]]; then set -- "$@" --device cpu; else export CUDA_VISIBLE_DEVICES=${gpus[0]}; fi
    exec "$PYTHON" "$ROOT/compute_gradient_features.py" "$@" --num_chunks "$NUM_CHUNKS" --chunk_idx 0
fi
threads=$(($(nproc) / ${#gpus[@]}))

say() {
    echo "$(date +%H:%M:%S) $*"
}

# The last thing that a process of this call has said; a progress bar rewrites its line.
last_words() { # NUMBER
    tail -c "+$((sizes[$1] + 1))" "${logs[$1]}" | tail -c 2000 | tr '\r' '\n' | grep -v '^ *$' | tail -n 1
}

# One line over all chunks, with the time left at the rate since this call.
show_progress() {
    local finished total left=''
    read -r finished total < <(run_module tive.features.launch "$folder" "$NUM_CHUNKS")
    if ((${total:-0} == 0)); then
        say "no chunk is begun yet"
        return
    fi
    ((finished > before)) && left=", $(((total - finished) * (SECONDS - begun) / (finished - before) / 60)) min left"
    say "$finished of $total records ($((100 * finished / total))%), ${#gpus[@]} processes$left"
}

read -r before _ < <(run_module tive.features.launch "$folder" "$NUM_CHUNKS")
processes=() logs=() sizes=()
for number in "${!gpus[@]}"; do
    gpu=${gpus[number]}
    log=$folder/log_$(hostname)_$number.txt
    say "process $number: started on $gpu, log in $log"
    echo "== $(date '+%F %T') on $gpu" >>"$log"
    sizes+=("$(stat -c %s "$log" 2>/dev/null || stat -f %z "$log")")
    (
        if [[ $gpu == cpu ]]; then
            set -- "$@" --device cpu
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
        else
            export CUDA_VISIBLE_DEVICES=$gpu
        fi
        exec "$PYTHON" "$ROOT/compute_gradient_features.py" "$@" --num_chunks "$NUM_CHUNKS" --chunk_idx any
    ) >>"$log" 2>&1 &
    processes+=($!) logs+=("$log")
done

stopped=0
stop() { # SIGNAL-NUMBER
    stopped=$1
    say "stopping: each process finishes the records at hand"
    kill -TERM "${processes[@]}" 2>/dev/null
}
trap 'stop 2' INT
trap 'stop 15' TERM

begun=$SECONDS shown=$SECONDS
while [[ -n $(jobs -rp) ]]; do
    sleep 1 &
    wait $! # unlike sleep itself, it lets a signal through at once
    if ((SECONDS - shown >= ${STATUS_SECONDS:-30})); then
        shown=$SECONDS
        show_progress
    fi
done

errors=()
for number in "${!processes[@]}"; do
    wait "${processes[number]}"
    code=$?
    if ((code != 0 && !stopped)); then
        error=$(last_words "$number")
        # Prints once what stops all of them.
        [[ $'\n'$(printf '%s\n' "${errors[@]}")$'\n' == *$'\n'"$error"$'\n'* ]] ||
            echo "error: process $number on ${gpus[number]} ended with $code: $error (whole log: ${logs[number]})" >&2
        errors+=("$error")
    fi
done
if ((stopped)); then
    say "stopped; the same call continues"
    exit $((128 + stopped))
fi
missing=()
for ((chunk = 0; chunk < NUM_CHUNKS; chunk++)); do
    [[ -f $folder/manifest_$chunk.json ]] || missing+=("$chunk")
done
if ((${#missing[@]} > 0)); then
    echo "error: not complete: chunk ${missing[*]} of $NUM_CHUNKS; the same call continues" >&2
    exit 1
fi
say "all $NUM_CHUNKS chunks are complete in $folder"
