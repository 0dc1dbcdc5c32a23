#!/usr/bin/env bash
# Pretrains mini models for equal updates, finetunes them on five GLUE tasks with three seeds, prints
# a table and draws it.
#
#   bash launch/mini_on_glue.sh TEXT GLUE [RUNS]
#
# TEXT: directory of *-train-*.jsonl.xz and *-validation-*.jsonl.xz, 200 MB of English before
# compression. GLUE: a glue_dir with CoLA, SST-2, MRPC, STS-B and RTE. RUNS (default
# runs/mini_on_glue) receives everything; the same command resumes a stopped one, and
# UNTIL=pretrained ends it before finetuning. RUNS/results receives MODEL.json of pretraining,
# MODEL-TASK.json of finetuning, and scores.png.
#
# On 2 cores of an AMD EPYC (Zen 4) with Python 3.11 and jax 0.10.2, pretraining took 95 minutes and
# finetuning 95, with all but the first run in pairs, one core each; one at a time, as here, takes
# longer. launch/mini_on_glue_results holds the results:
#   python -m bipft_jax.comparison launch/mini_on_glue_results
set -euo pipefail
source "$(dirname "$0")/experiment.sh"
need_arguments 2 "$@"
text="$(from_root "$1")" glue="$(from_root "$2")" runs="$(from_root "${3:-$root/runs/mini_on_glue}")"
cd "$root"
tasks=(cola sst2 mrpc stsb rte)
require_text "$text"
for task in "${tasks[@]}"; do require_task "$glue" "$task"; done
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
install
keep_compiled "$runs"
make_corpus "$text" "$runs" --tokenizer sentencepiece:8000 --sequence_length 128

pretrain() {  # RECIPE FLAGS...
  local recipe="$1"
  shift
  train --config="configs/pretrain.py:$recipe,mini" --workdir="$runs/$recipe" \
    --config.corpus_dir="$runs/corpus" --config.num_updates=3000 --config.batch_size=16 \
    --config.masking_rate=0.4 --config.learning_rate=1e-3 --config.warmup_updates=200 \
    --config.dropout=0.0 --config.evaluate_every=500 --config.evaluation_sequences=512 "$@"
  cp "$runs/$recipe/result.json" "$runs/results/$recipe.json"
}

mkdir -p "$runs/results"
pretrain fp
taught=(--config.init_from="$runs/fp" --config.teacher="$runs/fp" --config.seed=1)
pretrain bipft_b "${taught[@]}"
pretrain bipft_a "${taught[@]}"
if [[ "${UNTIL:-}" == pretrained ]]; then exit; fi

# Each run trains on at most 9,600 examples. The model that is not pretrained has the size and
# tokenizer of bipft_b.
finetune() {  # MODEL RECIPE TASK FLAGS...
  local name="$1-$3" config="configs/finetune.py:$2,$3"
  shift 3
  train --config="$config" --workdir="$runs/$name" --config.glue_dir="$glue" \
    --config.max_updates=300 --config.evaluate_every=50 --config.max_length=64 \
    --config.learning_rate=5e-4 --config.schedule=linear --config.seeds='(0,1,2)' "$@"
  cp "$runs/$name/result.json" "$runs/results/$name.json"
}

for task in "${tasks[@]}"; do
  for recipe in fp bipft_a bipft_b; do
    finetune "$recipe" "$recipe" "$task" --config.init_from="$runs/$recipe"
  done
  finetune bipft_b-not-pretrained bipft_b "$task" --config.init_from="$runs/bipft_b" \
    --config.pretrained=False
done
echo
$python -m bipft_jax.comparison "$runs/results" --output "$runs/results/scores.png"
