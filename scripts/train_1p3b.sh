#!/usr/bin/env bash
# Times training steps of a random model shaped like Wan 2.1 1.3B, VSA against dense: tokens per second and share of peak.
#
#   scripts/train_1p3b.sh [STEPS] [JSON-FOLDER]
#
# Takes all GPUs that torch sees: first each with examples of its own, then all sharing each example's tokens. With a folder, the
# reports are written there as JSON. LATENT="T Y X" (81 frames of 480 x 832 by default), SPARSITY and BATCH (examples of a GPU) change what
# is timed.
set -euo pipefail
steps=${1:-10}
folder=${2:-}
latent=${LATENT:-21 60 104}
sparsity=${SPARSITY:-0.9}
batch=${BATCH:-1}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "torch sees no GPU here" >&2; exit 2; }

time_steps() { # devices that share an example, examples of a step
  # shellcheck disable=SC2206  # three numbers
  local options=(--benchmark "$steps" --shape 1.3b --latent $latent --sparsity "$sparsity" --batch-size "$2" --sequence-parallel "$1" --compile)
  if [ -n "$folder" ]; then
    mkdir -p "$folder"
    torchrun --standalone --nproc-per-node "$gpus" -m fastvideo train finetune "${options[@]}" --json |
      tee "$folder/train-1p3b-${gpus}gpus-sp$1.json"
  else
    torchrun --standalone --nproc-per-node "$gpus" -m fastvideo train finetune "${options[@]}"
  fi
}

time_steps 1 "$((batch * gpus))"
if [ "$gpus" -gt 1 ]; then
  time_steps "$gpus" "$batch"
fi
