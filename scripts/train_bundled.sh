#!/usr/bin/env bash
# Trains the bundled model in two stages and a dense counterpart of the first, measures quality, and draws the curves.
#
#   scripts/train_bundled.sh OUT [SECONDS]
#   INIT=bundled scripts/train_bundled.sh OUT [SECONDS]
#
# The stages are vsa, 7,000 steps from random weights, and vsa2, 7,000 more from those of vsa, more gently, at sparsity
# 0.75 from the first step and with two sprites in three quarters of the scenes; dense has the settings and steps of vsa. With
# INIT, the bundled model or the folder of another one with VSA, vsa2 alone is trained, from that model. The bundled model
# came from INIT=bundled when the first stage's model was the bundled one (docs/training/README.md has its hash); now
# that trains the present one further.
#
# Resumable: with a limit in seconds it stops after so long, and the same command continues where it stopped. OUT gets
# vsa/, dense/ and vsa2/ (metrics.jsonl, checkpoint.pt, model/), quality.json of vsa2 and loss.png.
set -euo pipefail
out=$1
seconds=${2:-1000000}
stages=(vsa dense vsa2)
[ -n "${INIT:-}" ] && stages=(vsa2)
run=(python3 -m fastvideo)
runs=()
started=$SECONDS
for stage in "${stages[@]}"; do
  runs+=("$stage=$out/$stage")
  [ -e "$out/$stage/model/config.json" ] && continue
  case $stage in
    vsa2)
      settings=(--init "${INIT:-$out/vsa/model}" --attention vsa --max-steps 7000 --two-sprite-share 0.75
        --sparsity-levels 0 0.75 --sparsity-ramp 0 --muon-learning-rate 0.006 --learning-rate 0.0012 --log-interval 100)
      ;;
    *) settings=(--attention "$stage" --log-interval 50) ;;
  esac
  left=$((seconds - (SECONDS - started)))
  [ "$left" -gt 30 ] || exit 3
  resume=()
  [ -e "$out/$stage/checkpoint.pt" ] && resume=(--resume)
  "${run[@]}" train --out "$out/$stage" --compile blocks --eval-interval 1000 --max-seconds "$left" "${settings[@]}" \
    "${resume[@]}"
done
python3 scripts/measure_quality.py "$out/vsa2/model" --prompts 240 --sparsity 0 0.75 --dtype bfloat16 --batch-size 120 \
  --out "$out/quality.json"
"${run[@]}" train --plot "$out/loss.png" --runs "${runs[@]}"
