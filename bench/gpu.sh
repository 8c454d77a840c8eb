#!/usr/bin/env bash
# What there is to measure on a GPU, in two runs of at most 280 s each, start included, without network:
#   run1  the card's ceilings, ours by workspace, the row kernel by launch, correctness, sanitizer, profile; tuned.json
#   run2  ours as tuned, peers, the other operations, k-means, a whole update, then tests marked gpu
# A step that fails, or takes too long, is reported and the next one runs; the tables come last, the exit status is then 1.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh run1|run2 [--output-dir DIR] [--python PYTHON] [--sources] [--tuned FILE] [--steps "A B ..."]
                    [--seconds N] [--dry-run]

  --output-dir DIR  at most eight files from both runs (default bench/results/gpu; runs/gpu-dry with --dry-run)
  --python PYTHON   the interpreter (default: $PYTHON, else python3)
  --sources         the sources as package: nothing is built or installed, the C++ module is left out
  --tuned FILE      run2: a table of tuned choices, as run 1 leaves it (default: kernels/tuned.json)
  --steps "A B"     only these steps, in the order of the run (its files are written anew)
  --seconds N       for everything (default 280; 1500 with --dry-run)
  --dry-run         every step without a GPU: tiny shapes on the CPU, the Triton kernels in the interpreter

Peers are taken from bench/wheels/*.whl (bench/carry.sh peers downloads them). Without a git folder, BENCH_COMMIT names the
commit.
TEXT
}

SECONDS=0
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD run='' output='' python=${PYTHON:-python3} seconds='' sources=0 dry=() more=()
while [ $# -gt 0 ]; do
    case $1 in
        run1 | run2) run=$1; shift ;;
        --output-dir | --python | --seconds | --tuned | --steps)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --output-dir) output=$2 ;;
                --python) python=$2 ;;
                --seconds) seconds=$2 ;;
                --tuned) more+=(--tuned "$(realpath "$2")") ;;
                --steps) read -r -a steps <<<"$2"; more+=(--steps "${steps[@]}") ;;
            esac
            shift 2 ;;
        --sources) sources=1; shift ;;
        --dry-run) dry=(--dry-run); shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
[ -n "$run" ] || { echo "gpu.sh: run1 or run2?" >&2; usage >&2; exit 2; }
if [ ${#dry[@]} -gt 0 ]; then
    output=${output:-runs/gpu-dry} seconds=${seconds:-1500}
    export TRITON_INTERPRET=1
else
    output=${output:-bench/results/gpu} seconds=${seconds:-280}
fi

# shellcheck source=gpu/package.sh
. bench/gpu/package.sh
use_folders "$output" "$python"
if [ $sources = 1 ]; then use_sources "$root" "$scratch"; fi
use_wheels "$python" "$root/bench/wheels" "$scratch/peers"
export BENCH_ROOT=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

left=$((seconds - SECONDS))
timeout --kill-after=2 "$left" "$python" -m bench.gpu "$run" --output-dir "$output" --seconds $((left - 12)) \
    ${dry[@]+"${dry[@]}"} ${more[@]+"${more[@]}"}
status=$?
[ $status = 124 ] && echo "gpu.sh: stopped after $seconds s; what was found is in $output/$run.jsonl"
echo "$run took $SECONDS s"
exit $status
