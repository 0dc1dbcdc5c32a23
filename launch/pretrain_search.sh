#!/usr/bin/env bash
# What makes a binary model learn more from each token. Pretrains a full-precision mini (4 x 256) on
# 8 M tokens; then bipft_b from its weights and with it as teacher, on 5 M tokens in another order,
# with the best settings, with the defaults of configs/pretrain.py, with those at another batch, and
# with the best settings step by step, after BiT's recipes of 4-bit and 2-bit activations.
# Prints a table of held-out losses and plots the curves.
#
#   bash launch/pretrain_search.sh TEXT VOCABULARY [RUNS]
#
# TEXT: directory of *-train-*.jsonl.xz and *-validation-*.jsonl.xz, 200 MB of English before
# compression. VOCABULARY: vocab.txt of BERT, uncased. RUNS (default runs/pretrain_search) receives
# everything; the same command resumes a stopped one. RUNS/results receives result.json and
# metrics.jsonl of each run, and curves.png. Variables of the environment:
#
#   POINTS="best-1 defaults-1 best-2 defaults-2 batch-32-1 stepwise-1"   NAME-SEED, in this order
#
# On two CPU cores (AMD EPYC, Zen 5; float32) a run takes 15 minutes. launch/pretrain_search_results
# has the results and what they say.
set -euo pipefail
source "$(dirname "$0")/experiment.sh"
need_arguments 2 "$@"
text="$(from_root "$1")" vocabulary="$(from_root "$2")"
runs="$(from_root "${3:-$root/runs/pretrain_search}")"
cd "$root"
split_words names "${POINTS:-best-1 defaults-1 best-2 defaults-2 batch-32-1 stepwise-1}"

sequences=78080  # of 64 tokens: 5 M tokens
batches() {  # SIZE [PARTS] -> the flags of a run of so many sequences, or of one of its parts
  local updates=$((sequences / $1 / ${2:-1}))
  echo "--config.batch_size=$1 --config.num_updates=$updates --config.warmup_updates=$((updates / 10))"
}
best="$(batches 32) --config.learning_rate=1e-3 --config.mlm_distillation=1 \
--config.dropout=0.0 --config.teacher_dropout=False"
declare -A points=(  # of two values for a flag, the last one counts
  [best]="$best"
  [defaults]="$(batches 256)"  # a warm-up of 500 updates, the default, would be longer than the run
  [batch-32]="$(batches 32)"
  [stepwise]="$best $(batches 32 2)"
)
first=(bit_w1a4 bit_w1a2)  # recipes before bipft_b in stepwise, each with a quarter of the sequences

for name in "${names[@]}"; do
  if [[ ! "$name" =~ ^(.+)-[0-9]+$ || -z "${points[${BASH_REMATCH[1]}]:-}" ]]; then
    fail "POINTS has $name: give NAME-SEED, NAME one of ${!points[*]}"
  fi
done
require_text "$text"
require "$vocabulary" "VOCABULARY is BERT's vocab.txt"

install
keep_compiled "$runs"
make_corpus "$text" "$runs" --tokenizer "$vocabulary" --sequence_length 64

pretrain() {  # NAME RECIPE FLAGS...
  local name="$1" recipe="$2"
  shift 2
  echo
  echo "== $name"
  train --config="configs/pretrain.py:$recipe,mini" --workdir="$runs/$name" \
    --config.corpus_dir="$runs/corpus" --config.log_every=61 --config.evaluate_every=305 "$@"
  mkdir -p "$runs/results/$name"
  cp "$runs/$name"/{result.json,metrics.jsonl} "$runs/results/$name"
}
pretrain fp fp --config.batch_size=64 --config.num_updates=1952 --config.warmup_updates=195 \
  --config.learning_rate=1e-3 --config.dropout=0.0 --config.evaluate_every=976
for name in "${names[@]}"; do
  read -ra flags <<< "${points[${name%-*}]}"
  start="$runs/fp"
  taught=(--config.teacher="$runs/fp" --config.seed="${name##*-}" "${flags[@]}")
  if [[ "$name" == stepwise-* ]]; then
    for recipe in "${first[@]}"; do
      pretrain "$name-$recipe" "$recipe" --config.init_from="$start" "${taught[@]}" $(batches 32 4)
      start="$runs/$name-$recipe"
    done
  fi
  pretrain "$name" bipft_b --config.init_from="$start" "${taught[@]}"
done
echo
$python -m bipft_jax.comparison "$runs/results"
$python -m bipft_jax.plot "${names[@]/#/$runs/results/}" --output "$runs/results/curves.png"
