#!/usr/bin/env bash
# Step 3 over all GPUs of this machine: one process a GPU, one chunk a process; a free GPU takes the next chunk.
#
#   bash scripts/compute_gradients.sh --input_file data.json --image_folder images \
#       --model_path checkpoints/reference-lora --model_base vicuna-7b-v1.5 --output_file features
#
# All arguments go to compute_gradient_features.py. Variables:
#   GPUS="0 1 2"     ids of the GPUs (default: all that torch sees; without one, "cpu"). "cpu cpu" runs two processes.
#   NUM_CHUNKS=16    number of chunks (default: one a GPU). More, and smaller, leave no GPU idle at the end.
#   STATUS_SECONDS   how often the running chunks are shown (default: 30)
#
# Each chunk's output goes to DIR/log_K.txt. A chunk that fails holds no other back, but its GPU takes no more. The same
# call continues: what is done is verified and not computed again. Ctrl-C or SIGTERM lets each chunk finish its window;
# a second Ctrl-C does not wait. Exit code: 0 all done, 1 a chunk failed, 130 or 143 stopped.
set -uo pipefail
# shellcheck source=scripts/shell/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/python.sh"

if [[ $# == 0 || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    help_of "$0"
    exit
fi
arguments=("$@")
folder='' previous=''
for argument in "$@"; do
    [[ $previous != --output_file ]] || folder=$argument
    case $argument in
        --output_file=*) folder=${argument#*=} ;;
        --num_chunks* | --chunk_idx*) fail "$argument: set the number of chunks with NUM_CHUNKS" ;;
        --overwrite) echo "note: with --overwrite each call starts afresh; leave it out to continue" ;;
        *) ;;
    esac
    previous=$argument
done
[[ -n $folder ]] || fail "name the feature folder with --output_file"
mkdir -p "$folder" || fail "cannot make $folder"

GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES:-}}
if [[ -z $GPUS ]]; then
    GPUS=$("$PYTHON" -c 'import torch; print(*range(torch.cuda.device_count()))') || fail "$PYTHON cannot import torch"
fi
GPUS=${GPUS//,/ }
read -ra free <<<"${GPUS:-cpu}"
NUM_CHUNKS=${NUM_CHUNKS:-${#free[@]}}
[[ $NUM_CHUNKS =~ ^[1-9][0-9]*$ ]] || fail "NUM_CHUNKS=$NUM_CHUNKS is not a positive number"
export PYTHONUNBUFFERED=1
processors=$(nproc)
threads=$((processors / ${#free[@]}))

declare -A gpu_of chunk_of # by process id
next=0 stopped=0
failed=()

say() {
    echo "$(date +%H:%M:%S) $*"
}

start_chunk() { # GPU CHUNK
    local device=() log=$folder/log_$2.txt
    say "chunk $2 of $NUM_CHUNKS: started on $1, log in $log"
    echo "== $(date '+%F %T') chunk $2 on $1" >>"$log"
    (
        if [[ $1 == cpu ]]; then
            device=(--device cpu)
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
        else
            export CUDA_VISIBLE_DEVICES=$1
        fi
        exec "$PYTHON" "$ROOT/compute_gradient_features.py" "${arguments[@]}" "${device[@]}" \
            --num_chunks "$NUM_CHUNKS" --chunk_idx "$2"
    ) >>"$log" 2>&1 &
    gpu_of[$!]=$1 chunk_of[$!]=$2
}

# The last thing that a chunk's log says; a progress bar rewrites its line.
last_words() {
    tail -c 2000 "$folder/log_$1.txt" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1
}

# Looks at a process that has ended; its GPU is free again if all went well.
end_chunk() { # PROCESS
    local chunk=${chunk_of[$1]} gpu=${gpu_of[$1]} code
    wait "$1"
    code=$?
    unset "chunk_of[$1]" "gpu_of[$1]"
    if ((code == 0)); then
        say "chunk $chunk: $(last_words "$chunk")"
        free+=("$gpu")
    elif ((stopped)); then
        say "chunk $chunk: stopped"
    else
        say "chunk $chunk FAILED (exit code $code) on $gpu, which takes no more chunks: $(last_words "$chunk")"
        failed+=("$chunk")
    fi
}

stop() { # SIGNAL-NUMBER
    stopped=$1
    say "stopping: each chunk finishes the records at hand"
    kill -TERM "${!chunk_of[@]}" 2>/dev/null
}
trap 'stop 2' INT
trap 'stop 15' TERM

shown=$SECONDS
while true; do
    while ((!stopped && next < NUM_CHUNKS && ${#free[@]} > 0)); do
        start_chunk "${free[0]}" "$next"
        free=("${free[@]:1}")
        next=$((next + 1))
    done
    ((${#chunk_of[@]} > 0)) || break
    sleep 1 &
    wait $! # unlike sleep itself, it lets a signal through at once
    running=" $(jobs -rp | tr '\n' ' ') "
    for process in "${!chunk_of[@]}"; do
        [[ $running == *" $process "* ]] || end_chunk "$process"
    done
    if ((SECONDS - shown >= ${STATUS_SECONDS:-30})); then
        shown=$SECONDS
        for process in "${!chunk_of[@]}"; do
            say "chunk ${chunk_of[$process]} on ${gpu_of[$process]}: $(last_words "${chunk_of[$process]}")"
        done
    fi
done

if ((stopped)); then
    say "stopped; the same call continues"
    exit $((128 + stopped))
fi
for chunk in "${failed[@]}"; do
    echo "error: chunk $chunk failed: $(last_words "$chunk") (whole log: $folder/log_$chunk.txt)" >&2
done
((next == NUM_CHUNKS)) || echo "error: chunks $next to $((NUM_CHUNKS - 1)) were not started: no GPU is left" >&2
((${#failed[@]} == 0)) || exit 1
say "all $NUM_CHUNKS chunks are complete in $folder"
