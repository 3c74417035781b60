#!/usr/bin/env bash
# Trains the bundled model and its dense counterpart with equal steps, measures quality, and draws the curves.
#
#   scripts/train_bundled.sh OUT [SECONDS]
#   INIT=bundled scripts/train_bundled.sh OUT [SECONDS]
#
# Resumable: with a limit in seconds it stops after so long, and the same command continues where it stopped. OUT gets
# vsa/ and dense/ (metrics.jsonl, checkpoint.pt, model/), quality.json and loss.png. With INIT, the bundled model or the
# folder of another one with VSA, that model is trained further, more gently and on more scenes of two sprites, without a
# dense counterpart.
set -euo pipefail
out=$1
seconds=${2:-1000000}
kinds=(vsa dense)
settings=()
if [ -n "${INIT:-}" ]; then
  kinds=(vsa)
  settings=(--init "$INIT" --max-steps 11000 --two-sprite-share 0.75 --muon-learning-rate 0.006 --learning-rate 0.0012)
fi
run=(python3 -m fastvideo)
runs=()
started=$SECONDS
for kind in "${kinds[@]}"; do
  runs+=("$kind=$out/$kind")
  [ -e "$out/$kind/model/config.json" ] && continue
  left=$((seconds - (SECONDS - started)))
  [ "$left" -gt 30 ] || exit 3
  resume=()
  [ -e "$out/$kind/checkpoint.pt" ] && resume=(--resume)
  "${run[@]}" train --out "$out/$kind" --attention "$kind" --compile blocks --eval-interval 1000 --log-interval 50 \
    --max-seconds "$left" "${settings[@]}" "${resume[@]}"
done
python3 scripts/measure_quality.py "$out/vsa/model" --prompts 240 --sparsity 0 0.75 --dtype bfloat16 --batch-size 120 \
  --out "$out/quality.json"
"${run[@]}" train --plot "$out/loss.png" --runs "${runs[@]}"
