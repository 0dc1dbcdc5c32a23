#!/usr/bin/env bash
# Scaling laws of BitNet decoders: trains recipes at five sizes on the same batches, fits the law
# a N^b + c to the smaller sizes, and compares its prediction with the largest.
#
#   bash launch/bitnet_scaling.sh [RUNS]
#
# RUNS (default runs/bitnet_scaling) receives everything; the same command goes on with a stopped
# one; other values of the variables need another RUNS. The results are copied to RUNS/results, with
# scaling.png. Variables of the environment, with the values for two CPU cores:
#
#   RECIPES="bitnet_fp bitnet_b158 bitnet_b1"
#   SIZES="2x48 3x64 4x96 5x128 6x160"   smallest first; those of bipft_jax/models/decoder_recipes.py
#                                        that are named LAYERSxHIDDEN
#   SEEDS_OF_SMALL=2                     seeds of the three smallest sizes; the others have one
#   UPDATES=400  BATCH=64  LENGTH=128    tokens of a run: their product
#   TEXT=package-docs  VOCABULARY=1024   of the corpus (python -m bipft_jax.data.corpus --help)
#   DTYPE=float32                        bfloat16 on a GPU or TPU
#
# For a GPU: SIZES="4x192 6x256 8x384 10x512 12x640" LENGTH=512 BATCH=128 UPDATES=460
# VOCABULARY=4096 DTYPE=bfloat16, with 30 million tokens of text.
#
# The peak rate of each recipe is the best of three at the smallest size, and falls with the square
# root of the hidden size. Rates beyond these three are better at the smallest size (up to 3.2e-2
# for full precision, 4.8e-2 for 1.58 bits), but not at the larger ones: with 3.2e-2, 4x96 learns
# less than 2x48. Quantised recipes train in two stages (configs/pretrain.py).
set -euo pipefail
source "$(dirname "$0")/experiment.sh"
need_arguments 0 "$@"
runs="$(from_root "${1:-$root/runs/bitnet_scaling}")"
cd "$root"
split_words recipes "${RECIPES:-bitnet_fp bitnet_b158 bitnet_b1}"
split_words sizes "${SIZES:-2x48 3x64 4x96 5x128 6x160}"
updates="${UPDATES:-400}" length="${LENGTH:-128}"
declare -A rates=([bitnet_fp]="5e-4 1e-3 2e-3" [bitnet_b158]="1.5e-3 3e-3 6e-3" [bitnet_b1]="2e-3 4e-3 8e-3")
for recipe in "${recipes[@]}"; do
  if [[ -z "${rates[$recipe]:-}" ]]; then
    fail "RECIPES has $recipe: choose from ${!rates[*]}"
  fi
done
for size in "${sizes[@]}"; do
  if [[ ! "$size" =~ ^[0-9]+x[0-9]+$ ]]; then
    fail "SIZES has $size: give sizes named LAYERSxHIDDEN"
  fi
done
install
keep_compiled "$runs"

$python -m bipft_jax.data.corpus --input "${TEXT:-package-docs}" --output "$runs/corpus" \
  --tokenizer "sentencepiece:${VOCABULARY:-1024}" --sequence_length "$length"

pretrain() {  # RECIPE SIZE SEED RATE NAME
  if [[ -f "$runs/$5/result.json" ]]; then return; fi
  echo; echo "== $5"
  train --config="configs/pretrain.py:$1,$2" --workdir="$runs/$5" \
    --config.corpus_dir="$runs/corpus" --config.num_updates="$updates" \
    --config.warmup_updates="$((updates / 10))" --config.batch_size="${BATCH:-64}" \
    --config.learning_rate="$4" --config.seed="$3" --config.dtype="${DTYPE:-float32}" \
    --config.evaluate_every="$updates" --config.log_every="$((updates / 8 + 1))"
}

mkdir -p "$runs/results"
for recipe in "${recipes[@]}"; do
  for rate in ${rates[$recipe]}; do
    pretrain "$recipe" "${sizes[0]}" 0 "$rate" "rates/$recipe-${sizes[0]}-$rate"
  done
  best="$($python - "$runs"/rates/"$recipe-${sizes[0]}"-*/result.json <<'PYTHON'
import json, sys

results = [json.load(open(path)) for path in sys.argv[1:]]
losses = {r["config"]["learning_rate"]: r["seeds"][0]["last"]["loss"] for r in results}
print(min(losses, key=losses.get))
PYTHON
  )"
  echo "peak rate of $recipe at ${sizes[0]}: $best"
  for number in "${!sizes[@]}"; do
    size="${sizes[$number]}"
    rate="$($python -c "print(f'{$best * (${sizes[0]#*x} / ${size#*x}) ** 0.5:.3g}')")"
    seeds=1
    if [[ "$number" -lt 3 ]]; then seeds="${SEEDS_OF_SMALL:-2}"; fi
    for ((seed = 0; seed < seeds; seed++)); do
      pretrain "$recipe" "$size" "$seed" "$rate" "$recipe-$size-$seed"
      cp "$runs/$recipe-$size-$seed/result.json" "$runs/results/$recipe-$size-$seed.json"
    done
  done
done
echo
$python -m bipft_jax.scaling "$runs/results" --output "$runs/results/scaling.png"
