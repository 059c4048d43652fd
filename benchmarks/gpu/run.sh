#!/bin/bash
# Every measurement on one NVIDIA GPU, the important ones first, in under 9 minutes: no network is needed.
# Usage, in the repository's root: benchmarks/gpu/run.sh OUT [WHEELS [PART...]]
#   OUT: folder of the results, written as they come.   WHEELS: folder of what the machine lacks, or "" for nothing.
#   PART: names of the parts below; by default all of them, as far as the time goes.
#   QCLI_SECONDS: for everything, 530 by default.   QCLI_TINY=1: on a CPU, at tiny sizes, to find errors of the scripts.
set -u
out=$(realpath -m "${1:?folder of the results}")
wheels=${2:-}
shift $(($# < 2 ? $# : 2))
parts=" $* "
mkdir -p "$out"
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" QCLI_RESULTS="$out" PYTHONUNBUFFERED=1 QCLI_CACHE="$out/cache"
workers=14 slower=1
[ "${QCLI_TINY:-}" = 1 ] && workers=1 slower=5

part() { # part NAME SECONDS COMMAND...: its output goes to OUT/NAME.log, its end and its time to the terminal
    local name=$1 limit=$2 left=$((${QCLI_SECONDS:-530} * slower - SECONDS))
    shift 2
    [ "$parts" = "  " ] || [[ $parts == *" $name "* ]] || return 0
    if [ $left -lt 10 ]; then
        echo "== $name: no time left"
        return
    fi
    limit=$((limit * slower < left ? limit * slower : left))
    local begun=$SECONDS
    timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 || # pytest then tells what failed so far
         echo "$name ended with $? (124: after its limit of $limit s)"
    echo "== $name: $((SECONDS - begun)) s"
    tail -n "${LINES_SHOWN:-40}" "$out/$name.log"
}

tests() { # tests NAME SECONDS FILE...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 -m pytest -v -n "$workers" -p no:cacheprovider --override-ini addopts= --durations 10 "$@"
}

tests smoke 110 tests/test_cuda.py
part quantizing 100 python3 -m benchmarks.gpu.quantizing 8B --limit 80
part distilling 60 python3 -m benchmarks.gpu.distilling --limit 50
part determinism 80 python3 -m benchmarks.gpu.determinism
part commands 70 python3 -m benchmarks.gpu.commands
part large 70 python3 -m benchmarks.gpu.quantizing 70B --limit 50
part small 40 python3 -m benchmarks.gpu.quantizing 135M --limit 30
part kernels 40 python3 -m benchmarks.gpu.kernels
tests correct 60 tests/inference/test_triton.py tests/core/test_fake_*.py tests/algorithms/solvers/test_feedback.py
part layers 80 python3 -m benchmarks.gpu.layers table --shapes 1
part decoding 90 python3 -m benchmarks.gpu.decoding
part shapes 60 python3 -m benchmarks.gpu.layers table --rows 1,16 --name gpu_shapes
part sweep 60 python3 -m benchmarks.gpu.layers sweep --shapes 1 --rows 1,16
