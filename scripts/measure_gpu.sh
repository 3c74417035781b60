#!/usr/bin/env bash
# Test on a CUDA device, then measure: everything that docs/kernels.md and the README show of GPUs.
#
#   scripts/measure_gpu.sh [FOLDER]            all of it, results in FOLDER (benchmarks/results)
#   PARTS="test layers" scripts/measure_gpu.sh    only some parts: test, layers, stages, fine, sweep, million, small
#
# Each shape is a process of its own with a time limit, so that one failure costs nothing but its own rows.
set -u
folder=${1:-benchmarks/results}
parts=${PARTS:-test layers stages fine sweep million small}
python=${PYTHON:-python}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
status=0

bench() { # NAME SECONDS ARGUMENT...
    local name=$1 limit=$2
    shift 2
    echo "== $name: fastvideo bench $*"
    timeout -s KILL "$limit" "$python" -m fastvideo bench "$@" --device cuda --json "$folder/$name.json" 2> "$folder/$name.log"
    local code=$?
    if [ $code -gt 1 ]; then
        echo "== $name ended with status $code"
        tail -n 5 "$folder/$name.log"
        status=1
    fi
}

for part in $parts; do
    case $part in
        test)
            at_once=()
            "$python" -c 'import xdist' 2> /dev/null && at_once=(-n 8)
            timeout -s KILL 500 "$python" -m pytest -q "${at_once[@]}" --durations 8 tests/gpu tests/block_sparse/test_traps.py 2>&1 |
                tee "$folder/gpu-tests.txt" | tail -n 40
            [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
            ;;
        layers)
            bench wan2.1-1.3b-480p 150 wan2.1-1.3b-480p --impls hopper triton cudnn --inputs random video-like skewed
            bench wan2.1-1.3b-480p-auto 90 wan2.1-1.3b-480p --impls hopper triton --tiles auto auto128
            bench wan2.1-14b-720p 240 wan2.1-14b-720p --impls hopper triton cudnn --inputs random video-like --rounds 2
            bench wan2.1-14b-720p-auto 150 wan2.1-14b-720p --backends VIDEO_SPARSE_ATTN --impls hopper triton --tiles auto auto128 --rounds 2
            bench hunyuan-720p 200 hunyuan-720p --impls hopper triton --rounds 2
            bench sliding-and-8-bit 90 wan2.1-1.3b-480p --backends TORCH_SDPA SAGE_ATTN SLIDING_TILE_ATTN --passes forward
            ;;
        stages)
            timeout -s KILL 90 "$python" benchmarks/vsa_stages.py wan2.1-1.3b-480p wan2.1-14b-720p --json "$folder/stages.json" || status=1
            ;;
        fine)
            bench fine-49k-tile64 150 fine-49k-tile64 --backends VIDEO_SPARSE_ATTN --impls hopper triton cudnn flex --inputs random video-like
            bench fine-92k-tile64 150 fine-92k-tile64 --backends VIDEO_SPARSE_ATTN --impls hopper triton cudnn --inputs random video-like --rounds 2
            bench fine-49k-tile128 150 fine-49k-tile128 --backends VIDEO_SPARSE_ATTN --impls hopper triton flash flex
            # The same from a card that has just done nothing.
            for shape in fine-49k-tile64 fine-92k-tile64; do
                bench "$shape-forward-at-rest" 90 "$shape" --backends VIDEO_SPARSE_ATTN --impls hopper cudnn --passes forward --rest 1 \
                    --inputs random video-like
                bench "$shape-at-rest" 120 "$shape" --backends VIDEO_SPARSE_ATTN --impls hopper cudnn --rest 1 --inputs random video-like
            done
            bench fine-49k-tile128-at-rest 90 fine-49k-tile128 --backends VIDEO_SPARSE_ATTN --impls hopper flash --rest 1
            ;;
        sweep)
            bench sparsity-480p 200 wan2.1-1.3b-480p --impls auto --sparsities 0.5 0.7 0.8 0.9 0.95 --no-errors --plot "$folder/sparsity-480p.png"
            bench sparsity-720p 240 wan2.1-14b-720p --impls auto --sparsities 0.7 0.8 0.9 0.95 --no-errors --rounds 1 \
                --plot "$folder/sparsity-720p.png"
            ;;
        million)
            bench million-tokens 300 million-tokens --backends VIDEO_SPARSE_ATTN --impls hopper triton --rounds 1
            ;;
        small)
            bench sprites 60 sprites --impls hopper triton --inputs random video-like
            # Named for CPUs and for tests of the benchmark; here they show what a launch costs.
            for shape in cpu-4k cpu-16k tiny tiny-fine; do
                bench "$shape" 60 "$shape" --rounds 1
            done
            ;;
        *)
            echo "unknown part $part; there are test, layers, stages, fine, sweep, million and small"
            status=2
            ;;
    esac
done
exit $status
