# Functions of bench/gpu.sh and bench/gpu_study.sh: the package from its sources, and wheels without a network.

# use_folders OUTPUT PYTHON: `output` and `python` as whole paths, a `scratch` folder that goes with the script.
use_folders() {
    mkdir -p "$1" || exit 1
    output=$(cd "$1" && pwd) python=$2
    case $python in ./* | */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
    scratch=$(mktemp -d) || exit 1
    trap 'rm -rf "$scratch"' EXIT
}

# use_sources ROOT SCRATCH: a package without its C++ module in SCRATCH, which is the working folder afterwards: the root's
# own stable_rlhf folder, which lacks the kernels, would come first. So it would in tests, which are copied too.
use_sources() {
    cp -r "$1/stable_rlhf" "$2/stable_rlhf"
    rm -f "$2"/stable_rlhf/_C.*  # of another Python, or another machine
    cp -r "$1/kernels" "$2/stable_rlhf/kernels"
    cp -r "$1/recipes" "$2/stable_rlhf/recipes"
    ln -s "$1/bench" "$2/bench"
    ln -s "$1/recipes" "$2/recipes"
    cp -r "$1/tests" "$1/pyproject.toml" "$2/"
    export PYTHONPATH="$2${PYTHONPATH:+:$PYTHONPATH}"
    cd "$2" || exit 1
}

# use_wheels PYTHON FOLDER TARGET: one at a time and into a folder of their own: a wheel that does not fit leaves the others
# and the machine alone.
use_wheels() {
    local wheel
    for wheel in "$2"/*.whl; do
        [ -e "$wheel" ] || continue
        "$1" -m pip install --quiet --no-index --no-deps --no-compile --target "$3" "$wheel" 2>/dev/null ||
            echo "left out: $(basename "$wheel")"
    done
    [ ! -d "$3" ] || export PYTHONPATH="$3${PYTHONPATH:+:$PYTHONPATH}"
}
