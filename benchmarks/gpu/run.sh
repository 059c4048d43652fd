#!/bin/bash
# Every measurement on one NVIDIA GPU, the important ones first, in under 9 minutes: no network is needed.
# Usage, in the repository's root: benchmarks/gpu/run.sh OUT [WHEELS]
#   OUT: folder of the results, written as they come.   WHEELS: folder of what the machine lacks, if anything.
set -u
out=$(realpath -m "${1:?folder of the results}")
mkdir -p "$out"
if [ -n "${2:-}" ]; then
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$2"/*.whl || exit
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" QCLI_RESULTS="$out" PYTHONUNBUFFERED=1

part() { # part NAME SECONDS COMMAND...: its output goes to OUT/NAME.log, its end to the terminal
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || echo "$name ended with $?"
    tail -n "${LINES_SHOWN:-40}" "$out/$name.log"
}

part correct 60 python3 -m pytest -q -n 14 -p no:cacheprovider --override-ini addopts= tests/inference/test_triton.py
part layers 80 python3 -m benchmarks.gpu.layers table --shapes 1
part decoding 90 python3 -m benchmarks.gpu.decoding
part quantizing 150 python3 -m benchmarks.gpu.quantizing
part shapes 60 python3 -m benchmarks.gpu.layers table --rows 1,16 --name gpu_shapes
part sweep 60 python3 -m benchmarks.gpu.layers sweep --shapes 1 --rows 1,16
