#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one command and under nine minutes, without network:
#   1. builds the package with its C++ module      2. runs the tests marked gpu
#   3. times every operation beside its floor and whatever peers can be imported (or lie in bench/wheels/)
#   4. leaves JSON lines (device, driver, versions, commit) and logs      5. prints one short table
# A part that fails is reported and the next one runs; the exit status is then 1.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [--output-dir DIR] [--python PYTHON] [--seconds N] [--skip-build] [--skip-tests] [--dry-run]

  --output-dir DIR  where JSON lines and logs go (default bench/results/)
  --python PYTHON   the interpreter (default: $PYTHON, else python3)
  --seconds N       time for all parts together (default 525; 1500 with --dry-run)
  --skip-build      use the package as it is installed
  --dry-run         every step without a GPU: tiny shapes on the CPU, the Triton kernels in the interpreter

Without a git folder, BENCH_COMMIT names the commit in the results.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD output=bench/results device=cuda preset=gpu python=${PYTHON:-python3} seconds=525 limit=15 build=1 tests=1
peers=() marker=(-m gpu)
while [ $# -gt 0 ]; do
    case $1 in
        --output-dir | --python | --seconds)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --output-dir) output=$2 ;;
                --python) python=$2 ;;
                --seconds) seconds=$2 ;;
            esac
            shift 2 ;;
        --skip-build) build=0; shift ;;
        --skip-tests) tests=0; shift ;;
        --dry-run) device=cpu preset=dry seconds=1500 limit=60; shift ;;  # the interpreter is slow
        -h | --help) usage; exit 0 ;;
        *) echo "gpu.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
case $python in ./* | */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
failed=()
SECONDS=0

part() { printf '\n== %s (at %d s)\n' "$1" "$SECONDS"; }
fail() { failed+=("$1"); echo "FAILED: $1"; }
# Seconds that are left, less $1 for what comes after, and $2 at most.
left() {
    local rest=$((seconds - SECONDS - $1)) most=${2:-$seconds}
    rest=$((rest < most ? rest : most))
    echo $((rest > 10 ? rest : 10))
}
has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

"$python" -c 'import torch' || { echo "gpu.sh: $python has no torch" >&2; exit 1; }
if [ "$device" = cuda ]; then
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: torch sees no CUDA device (every step without one: --dry-run)" >&2; exit 1; }
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
else
    # Compiled peers and the CPU's own compiler have nothing to rehearse here, and take minutes.
    peers=(--peers plain,trl,numpy --backends triton --no-memory --rounds 3)
    # One test that runs the Triton kernels in the interpreter stands for those that need a GPU.
    marker=(-k "test_gae and here" tests/ops/test_sequence_triton.py)
    export TRITON_INTERPRET=1
fi

if [ $build = 1 ]; then
    part "building the package and its C++ module"
    timeout "$(left 60 120)" "$python" -m pip install --quiet --no-build-isolation --no-deps -e . \
        >"$output/gpu-build.log" 2>&1
    status=$?
    if [ $status != 0 ]; then
        tail -n 15 "$output/gpu-build.log"
        fail "build (pip exit status $status, gpu-build.log)"
        # The sources alone are a package too, without the C++ module: what runs on the GPU does not need it.
        mkdir -p "$scratch/sources"
        cp -r stable_rlhf "$scratch/sources/stable_rlhf"
        cp -r kernels "$scratch/sources/stable_rlhf/kernels"
        ln -s "$root/bench" "$scratch/sources/bench"
        export PYTHONPATH="$scratch/sources${PYTHONPATH:+:$PYTHONPATH}"
        cd "$scratch/sources" || exit 1  # the root's own stable_rlhf folder, which lacks the kernels, would come first
        echo "going on with the sources as they are"
    fi
fi
"$python" -c 'import stable_rlhf.ops as ops; from stable_rlhf.ops.backends import extension
print("C++ module:", "yes" if extension() else "no"); print("backends:", ops.backend_report())' || fail "import"

shopt -s nullglob
wheels=("$root"/bench/wheels/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    part "peers from bench/wheels"
    for wheel in "${wheels[@]}"; do
        # One at a time and into a folder of their own: a wheel that does not fit leaves the others and the machine alone.
        "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/peers" "$wheel" ||
            echo "peer left out: $(basename "$wheel")"
    done
    export PYTHONPATH="$scratch/peers${PYTHONPATH:+:$PYTHONPATH}"
fi
for module in liger_kernel cut_cross_entropy trl quack flash_attn deepspeed; do
    has $module || echo "not installed, goes on without: $module"
done

if [ $tests = 1 ]; then
    part "tests marked gpu"
    if has pytest; then
        (cd "$root" && timeout "$(left 60 150)" "$python" -m pytest "${marker[@]}" -q -p no:cacheprovider \
            --continue-on-collection-errors --junitxml="$output/gpu-tests.xml") >"$output/gpu-tests.log" 2>&1
        status=$?
        tail -n 15 "$output/gpu-tests.log"
        if [ $status != 0 ]; then fail "tests (pytest exit status $status, gpu-tests.log)"; fi
    else
        fail "tests (pytest is not installed)"
    fi
fi

part "benchmarks"
lines=$output/$preset-$(date +%Y%m%d-%H%M%S).jsonl
timeout --signal=INT --kill-after=5 "$(left 15)" "$python" -m bench --preset "$preset" --device "$device" \
    --limit $limit --budget 1.5 --deadline "$(left 75)" --output "$lines" --short "${peers[@]}" \
    >"$output/gpu-bench.log" 2>"$output/gpu-bench-steps.log"
status=$?
if [ $status != 0 ]; then
    tail -n 5 "$output/gpu-bench-steps.log"
    fail "benchmarks (exit status $status, gpu-bench.log)"
fi
grep -h "not started" "$output/gpu-bench-steps.log"

part "results"
for name in "${failed[@]}"; do echo "FAILED: $name"; done
if [ -s "$lines" ]; then
    echo "written: $(basename "$lines")"
    "$python" -m bench report "$lines" --short
    "$python" -m bench report "$lines" --plots "$output/plots"
else
    echo "no results"
fi
[ ${#failed[@]} = 0 ] && [ -s "$lines" ]
