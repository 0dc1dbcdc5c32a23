#!/usr/bin/env bash
# Pretrains a 1-bit MiniLM from the weights of all-MiniLM-L6-v2, finetunes it on six GLUE tasks with
# three seeds beside the full-precision model and beside the same binary model without pretraining in
# binary, and prints a table.
#
#   bash launch/minilm_on_glue.sh TEXT GLUE MINILM [RUNS]
#
# TEXT: directory of *-train-*.jsonl.xz and *-validation-*.jsonl.xz, 200 MB of English before
# compression. GLUE: a glue_dir with the tasks. MINILM: directory with config.json, vocab.txt and
# model.safetensors of all-MiniLM-L6-v2 (6 x 384). RUNS (default runs/minilm_on_glue) receives
# everything; the same command resumes a stopped one. The results are copied to RUNS/results. The
# binary model goes to RUNS/model, a directory that `python -m bipft_jax.interop.convert import`
# takes, with its 1-bit weights alone as bits.safetensors. Variables of the environment:
#
#   UNTIL=pretrained           ends before finetuning
#   DATA_WORKERS=0             processes that make pretraining examples; 6 keep up with one GPU
#   TASKS="cola sst2 mrpc stsb rte qnli"   in this order
#   PARALLEL=1                 finetunings at once; 6 share one GPU with 16 CPU cores well
#   UPDATES=6104               of pretraining in binary: 128 sequences of 128 tokens each; above 300.
#                              Another number needs another RUNS
#   DTYPE=bfloat16             of activations; float32 on most CPUs
#
# MiniLM has no head for masked words, so it first learns that objective in full precision (39 M
# tokens): it is then start and teacher of the binary model (100 M tokens), which also imitates its
# distribution of each masked token. launch/minilm_on_glue_results has the results of one NVIDIA
# H200 (jax 0.11.2, Python 3.12) and what else was tried.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help || $# -lt 3 ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  if [[ $# -lt 3 && "${1:-}" != -h && "${1:-}" != --help ]]; then exit 2; fi
  exit
fi
root="$(realpath "$(dirname "$0")/..")"
here() { realpath -m -s --relative-to="$root" "$1"; }
text="$(here "$1")" glue="$(here "$2")" minilm="$(here "$3")"
runs="$(here "${4:-$root/runs/minilm_on_glue}")"
cd "$root"
dtype="${DTYPE:-bfloat16}" updates="${UPDATES:-6104}" parallel="${PARALLEL:-1}" until="${UNTIL:-}"
read -ra tasks <<< "${TASKS:-cola sst2 mrpc stsb rte qnli}"

require() {  # FILE WHAT
  if [[ ! -e "$1" ]]; then
    echo "error: $1 is missing: $2" >&2
    exit 1
  fi
}
if [[ ! "$updates" =~ ^[0-9]+$ || "$updates" -le 300 ]]; then
  echo "error: UPDATES is $updates: give a number above 300" >&2
  exit 1
fi
if [[ ! "$parallel" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: PARALLEL is $parallel: give a number of finetunings, at least 1" >&2
  exit 1
fi
if [[ -n "$until" && "$until" != pretrained ]]; then
  echo "error: UNTIL is $until: leave it empty or give pretrained" >&2
  exit 1
fi
for split in train validation; do
  if ! compgen -G "$text/*-$split-*.jsonl.xz" > /dev/null; then
    echo "error: $text has no *-$split-*.jsonl.xz: TEXT is the directory of the pretraining text" >&2
    exit 1
  fi
done
for file in config.json vocab.txt model.safetensors; do
  require "$minilm/$file" "MINILM is a directory of all-MiniLM-L6-v2"
done
declare -A directories=([cola]=CoLA [sst2]=SST-2 [mrpc]=MRPC [stsb]=STS-B [rte]=RTE [qnli]=QNLI [qqp]=QQP [mnli]=MNLI)
for task in "${tasks[@]}"; do
  if [[ -z "${directories[$task]:-}" ]]; then
    echo "error: TASKS has $task: choose from ${!directories[*]}" >&2
    exit 1
  fi
  if [[ ! -d "$glue/glue" ]]; then  # else prepared by TensorFlow Datasets
    require "$glue/${directories[$task]}/train.tsv" "GLUE is a glue_dir with the tasks"
  fi
done

source launch/environment.sh
prepare_environment ""
python=.venv/bin/python
# The runs of a recipe share shapes: each is compiled once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(realpath -m "$runs/compiled")}"

$python -m bipft_jax.data.corpus --output "$runs/corpus" \
  --input "$text/*-train-*.jsonl.xz" --validation_input "$text/*-validation-*.jsonl.xz" \
  --tokenizer "$minilm/vocab.txt" --sequence_length 128
if [[ ! -e "$runs/minilm/config.json" ]]; then
  rm -rf "$runs/minilm"  # of an import that was stopped
  $python -m bipft_jax.interop.convert import "$minilm" --workdir "$runs/minilm"
fi

mkdir -p "$runs/results"
pretrain() {  # RECIPE FLAGS...
  local recipe="$1"
  shift
  $python launch/train.py --config="configs/pretrain.py:$recipe,minilm" --workdir="$runs/$recipe" \
    --config.corpus_dir="$runs/corpus" --config.masking_rate=0.3 --config.dropout=0.0 \
    --config.dtype="$dtype" --config.data_workers="${DATA_WORKERS:-0}" "$@"
  cp "$runs/$recipe/result.json" "$runs/results/$recipe.json"
}
pretrain fp --config.init_from="$runs/minilm" --config.batch_size=256 --config.num_updates=1200 \
  --config.warmup_updates=120 --config.learning_rate=3e-4 --config.evaluate_every=600 \
  --config.log_every=100
pretrain bipft_b --config.init_from="$runs/fp" --config.teacher="$runs/fp" \
  --config.teacher_dropout=False --config.mlm_distillation=1 --config.seed=1 \
  --config.batch_size=128 --config.num_updates="$updates" --config.warmup_updates=300 \
  --config.learning_rate=1e-3 --config.evaluate_every="$((updates / 8))" --config.log_every=109
if [[ ! -e "$runs/model/bits.safetensors" ]]; then
  rm -rf "$runs/model"
  $python -m bipft_jax.interop.convert export --workdir "$runs/bipft_b" --output "$runs/model"
  cat >> "$runs/model/README.md" <<'CARD'

It started from all-MiniLM-L6-v2 (Apache-2.0), of which its teacher is a descendant. The results that
bipft_jax publishes were made with articles of English Wikipedia (CC BY-SA 3.0) and novels in the
public domain.

## Limits

An encoder to finetune; it answers nothing by itself, and its word guesses are worse than those of
full-precision models. English, uncased.

`bits.safetensors` is the encoder alone as 1-bit weights, for texts of up to 128 tokens:
`bipft_runtime.Model("bits.safetensors").encode(["a text"])`.
CARD
  $python -m bipft_jax.interop.pack --workdir "$runs/bipft_b" --max_length 128 \
    --output "$runs/model/bits.safetensors"
fi
if [[ -n "$until" ]]; then exit; fi

declare -A lengths=([cola]=64 [sst2]=64 [stsb]=64)
finetune() {  # MODEL RECIPE START RATE TASK
  local name="$1-$5" log="$runs/$1-$5.log"
  if $python launch/train.py --config="configs/finetune.py:$2,$5" --workdir="$runs/$name" \
    --config.init_from="$runs/$3" --config.glue_dir="$glue" --config.seeds='(0,1,2)' \
    --config.learning_rate="$4" --config.max_length="${lengths[$5]:-128}" \
    --config.length_buckets=1 --config.schedule=linear --config.max_updates=1000 \
    --config.evaluate_every=250 --config.log_every=250 --config.dtype="$dtype" > "$log" 2>&1; then
    cp "$runs/$name/result.json" "$runs/results/$name.json"
    echo "$name: finished"
  else
    echo "error: $name failed: see $log" >&2
    return 1
  fi
}
trap 'kill $(jobs -p) 2> /dev/null; wait; exit 143' TERM  # finetunings save and end
running=0 failed=false
for task in "${tasks[@]}"; do
  for model in "fp fp minilm 1e-4" "bipft_b-from-minilm bipft_b minilm 5e-4" "bipft_b bipft_b bipft_b 3e-4"; do
    if ((running == parallel)); then
      wait -n || failed=true
      running=$((running - 1))
    fi
    read -ra arguments <<< "$model"
    finetune "${arguments[@]}" "$task" &
    running=$((running + 1))
  done
done
while ((running > 0)); do
  wait -n || failed=true
  running=$((running - 1))
done
echo
$python -m bipft_jax.comparison "$runs/results"
if $failed; then exit 1; fi
