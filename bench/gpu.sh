#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one command and under nine minutes, without network:
#   1. builds the package with its C++ module      2. runs the tests marked gpu
#   3. times the operations beside whatever peers can be imported (or lie in bench/wheels/)
#   4. leaves JSON (device, driver, versions, commit) and logs in the output folder      5. prints one short table
# A part that fails is reported and the next one runs; the exit status is then 1.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [--output-dir DIR] [--device cuda|cpu] [--preset gpu|cpu|quick] [--python PYTHON] [--seconds N]
                    [--skip-build] [--skip-tests]

  --output-dir DIR  where JSON and logs go (default bench/results/)
  --device cpu      a dry run without a GPU (with --preset quick)
  --python PYTHON   the interpreter (default: $PYTHON, else python3)
  --seconds N       time for all parts together (default 525)
  --skip-build      use the package as it is installed

Without a git folder, BENCH_COMMIT names the commit in the results.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
output=bench/results device=cuda preset=gpu python=${PYTHON:-python3} seconds=525 build=1 tests=1
while [ $# -gt 0 ]; do
    case $1 in
        --output-dir | --device | --preset | --python | --seconds)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --output-dir) output=$2 ;;
                --device) device=$2 ;;
                --preset) preset=$2 ;;
                --python) python=$2 ;;
                --seconds) seconds=$2 ;;
            esac
            shift 2 ;;
        --skip-build) build=0; shift ;;
        --skip-tests) tests=0; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
mkdir -p "$output" || exit 1
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
        echo "gpu.sh: torch sees no CUDA device (a dry run: --device cpu --preset quick)" >&2; exit 1; }
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
fi

if [ $build = 1 ]; then
    part "building the package and its C++ module"
    timeout "$(left 60 120)" "$python" -m pip install --quiet --no-build-isolation --no-deps -e . \
        >"$output/gpu-build.log" 2>&1
    status=$?
    if [ $status != 0 ]; then
        tail -n 15 "$output/gpu-build.log"
        fail "build (pip exit status $status, $output/gpu-build.log)"
        # The sources alone are a package too, without the C++ module: what runs on the GPU does not need it.
        mkdir -p "$scratch/sources"
        cp -r stable_rlhf "$scratch/sources/stable_rlhf"
        cp -r kernels "$scratch/sources/stable_rlhf/kernels"
        export PYTHONPATH="$scratch/sources${PYTHONPATH:+:$PYTHONPATH}"
        echo "going on with the sources as they are"
    fi
fi
# Away from the root of the repository, where the name stable_rlhf would find a folder without the kernels.
(cd "$scratch" && "$python" -c 'import stable_rlhf.ops as ops; from stable_rlhf.ops._backend import extension
print("C++ module:", "yes" if extension() else "no"); print("backends:", ops.backend_report())') || fail "import"

shopt -s nullglob
wheels=(bench/wheels/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    part "peers from bench/wheels"
    for wheel in "${wheels[@]}"; do
        # One at a time and into a folder of their own: a wheel that does not fit leaves the others and the machine alone.
        "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/peers" "$wheel" ||
            echo "peer left out: $wheel"
    done
    export PYTHONPATH="$scratch/peers${PYTHONPATH:+:$PYTHONPATH}"
fi
for module in liger_kernel cut_cross_entropy trl deepspeed; do
    has $module || echo "not installed, goes on without: $module"
done

if [ $tests = 1 ]; then
    part "tests marked gpu"
    if has pytest; then
        timeout "$(left 60 150)" "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
            --junitxml="$output/gpu-tests.xml" >"$output/gpu-tests.log" 2>&1
        status=$?
        tail -n 15 "$output/gpu-tests.log"
        if [ $status != 0 ]; then fail "tests (pytest exit status $status, $output/gpu-tests.log)"; fi
    else
        fail "tests (pytest is not installed)"
    fi
fi

part "benchmarks"
touch "$scratch/begin"
timeout --signal=INT --kill-after=5 "$(left 15)" "$python" bench/policy_loss.py --preset "$preset" --device "$device" \
    --limit 15 --budget 6 --deadline "$(left 75)" --output-dir "$output" --short >"$output/gpu-bench.log"
status=$?
if [ $status != 0 ]; then fail "benchmarks (exit status $status, $output/gpu-bench.log)"; fi
grep -h "not started" "$output/gpu-bench.log"

part "results"
mapfile -t results < <(find "$output" -maxdepth 1 -name 'policy_loss-*.json' -newer "$scratch/begin")
printf 'written: %s\n' "${results[@]}"
for name in "${failed[@]}"; do echo "FAILED: $name"; done
if [ ${#results[@]} -gt 0 ]; then
    "$python" bench/show.py "${results[@]}"
fi
[ ${#failed[@]} = 0 ]
