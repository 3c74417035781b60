#!/usr/bin/env bash
# Test on several CUDA devices, then measure: what docs/parallel.md and docs/parallel-model.md show of them.
#
#   scripts/measure_parallel.sh [FOLDER]                   all of it, results in FOLDER (benchmarks/results)
#   PARTS="test 720p" scripts/measure_parallel.sh          only some parts: test, 720p, 480p
#   RANKS=2 DEVICE=cpu PARTS=cpu scripts/measure_parallel.sh   the same on gloo, a small shape
#   MORE="" scripts/measure_parallel.sh                    without float8; more options of `fastvideo bench` at will
#
# Each step is a process of its own with a time limit, so that one failure costs nothing but its own rows; what a step has
# measured by then is in its file.
set -u
folder=${1:-benchmarks/results}
parts=${PARTS:-test 720p 480p}
more=${MORE---fp8}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [ "$ranks" -lt 2 ]; then
    echo "needs 2 CUDA devices or more, found $ranks"
    exit 2
fi
mkdir -p "$folder"
status=0

limited() { # SECONDS COMMAND...: ended with all it has started once the time is up
    local limit=$1
    shift
    "$@" &
    local process=$!
    (sleep "$limit" && end_tree $process) > /dev/null 2>&1 &
    local guard=$!
    wait $process
    local code=$?
    end_tree $guard
    return $code
}

end_tree() { # PROCESS: ranks are sessions of their own, and one that waits for a device outlives the process that started it
    "$python" - "$1" << 'PYTHON'
import os, pathlib, signal, sys

parents = {}
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        continue
    parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
tree = [int(sys.argv[1])]
for process in tree:
    tree += parents.get(process, [])
for process in tree:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
PYTHON
}

show() { # FILE: the rows that a step had measured when it ended
    "$python" - "$1" << 'PYTHON'
import json, sys
from fastvideo.benchmark.parallel_row import ParallelRow
from fastvideo.benchmark.report import format_parallel_rows

for result in json.load(open(sys.argv[1]))["results"]:
    print(f"\n{result['shape']}, as far as it came")
    print(format_parallel_rows([ParallelRow(**row) for row in result["rows"]], with_model=True))
PYTHON
}

bench() { # NAME SECONDS ARGUMENT...
    local name=$1-x$ranks limit=$2
    shift 2
    echo "== $name: fastvideo bench --parallel $*"
    limited "$limit" "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks" \
        -m fastvideo bench --parallel "$@" --device "$device" --peers --model --json "$folder/$name.json" 2> "$folder/$name.log" |
        tee "$folder/$name.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name ended with status $code"
        grep -v 'Warning\|^ *warnings.warn\|^frame #' "$folder/$name.log" | tail -n 15
        grep -q '^rank ' "$folder/$name.txt" || { [ -f "$folder/$name.json" ] && show "$folder/$name.json"; }
        status=1
    fi
}

for part in $parts; do
    case $part in
        test)
            mapfile -t files < <(grep -rl --include='test_*.py' 'mark.multi_gpu' tests)
            at_once=()
            "$python" -c 'import xdist' 2> /dev/null && at_once=(-n "${#files[@]}" --dist loadfile)
            limited 200 "$python" -m pytest -q -m multi_gpu "${at_once[@]}" --durations 8 "${files[@]}" 2>&1 |
                tee "$folder/multi-gpu-x$ranks.txt" | tail -n 60
            [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
            ;;
        # shellcheck disable=SC2086  # options, none of which holds a space
        720p) bench wan2.1-14b-720p 200 wan2.1-14b-720p --rounds 2 --round-ms 100 $more ;;
        # shellcheck disable=SC2086
        480p) bench wan2.1-1.3b-480p 100 wan2.1-1.3b-480p --rounds 3 --round-ms 60 $more ;;
        cpu) bench cpu-4k 100 cpu-4k --rounds 2 --round-ms 20 --backends TORCH_SDPA VIDEO_SPARSE_ATTN --dtype float32 ;;
        *)
            echo "unknown part $part; there are test, 720p, 480p and cpu"
            status=2
            ;;
    esac
done
exit $status
