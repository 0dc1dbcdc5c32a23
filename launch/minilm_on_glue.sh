#!/usr/bin/env bash
# Pretrains 1-bit MiniLMs from the weights of all-MiniLM-L6-v2, finetunes them on six GLUE tasks with
# three seeds beside full precision, beside the same model without pretraining in binary, and beside
# BiT and BiBERT, prints a table and draws it.
#
#   bash launch/minilm_on_glue.sh TEXT GLUE MINILM [RUNS]
#
# TEXT: directory of *-train-*.jsonl.xz and *-validation-*.jsonl.xz, 200 MB of English before
# compression; - if nothing is pretrained. GLUE: a glue_dir with the tasks. MINILM: directory with
# config.json, vocab.txt and model.safetensors of all-MiniLM-L6-v2 (6 x 384). RUNS (default
# runs/minilm_on_glue) receives everything; the same command resumes a stopped one. RUNS/results
# receives the result.json of each run, and scores.png. The pretrained bipft_b goes to RUNS/model, a
# directory that `python -m bipft_jax.interop.convert import` takes, with its 1-bit weights alone as
# bits.safetensors. Variables of the environment:
#
#   MODELS="fp bipft_b ..."    of the table below, to finetune (default: all); only what they start
#                              from is pretrained. A model with a teacher needs fp, in MODELS too or
#                              finished in RUNS
#   BINARY=DIR                 a directory such as RUNS/model, which then is bipft_b: it is imported,
#                              not pretrained. Another DIR needs another RUNS
#   UNTIL=pretrained           ends before finetuning
#   DATA_WORKERS=0             processes that make pretraining examples; 6 keep up with one GPU
#   TASKS="cola sst2 mrpc stsb rte qnli"   in this order
#   SEEDS=0,1,2                of finetuning
#   PARALLEL=1                 finetunings at once; 6 share one GPU with 16 CPU cores well
#   FINETUNE_FLAGS="--config.KEY=VALUE ..."   of every finetuning (configs/finetune.py), after its
#                              own, such as --config.dropout=0.0. Other flags need another RUNS
#   UPDATES=6104               of each pretraining in binary: 128 sequences of 128 tokens each; above
#                              300. Another number needs another RUNS
#   DTYPE=bfloat16             of activations; float32 on most CPUs
#
# MiniLM has no head for masked words, so it first learns that objective in full precision (39 M
# tokens): it is then start and teacher of the binary models (100 M tokens each), which also imitate
# its distribution of each masked token. launch/minilm_on_glue_results has the results of one NVIDIA
# H200 (jax 0.11.2, Python 3.12) and of two CPU cores, and what else was tried.
#
# The models: MODEL RECIPE START RATE KEY=VALUE..., as finetuning takes them. START is minilm; or
# teacher, the fp finetuned on the task (seed 0); or the name of a model pretrained in binary, with
# the recipe and the keys of its row. With a distillation, the teacher is that fp too. The rates of
# bit and bibert are the baseline's, not tuned.
set -euo pipefail
table=(
  "fp                            fp       minilm        1e-4"
  "bipft_b-from-minilm           bipft_b  minilm        5e-4"
  "bit                           bit_w1a1 teacher       5e-4 distillation=bit intermediate_recipes=bit_w1a2"
  "bibert                        bibert   teacher       5e-4 distillation=direction_matching"
  "bipft_a                       bipft_a  bipft_a       3e-4"
  "bipft_b                       bipft_b  bipft_b       3e-4"
  "bipft_b-rank4                 bipft_b  bipft_b-rank4 3e-4 estimator_rank=4"
  "bipft_b-distilled             bipft_b  bipft_b       3e-4 distillation=bit"
  "bipft_b-from-minilm-distilled bipft_b  minilm        5e-4 distillation=bit"
)
source "$(dirname "$0")/experiment.sh"
usage() {
  head_comment
  printf '  %s\n' "${table[@]}"
}
need_arguments 3 "$@"
declare -A rows
for row in "${table[@]}"; do
  names+=("${row%% *}")
  rows[${row%% *}]="$row"
done
text="$1" glue="$(from_root "$2")" minilm="$(from_root "$3")"
runs="$(from_root "${4:-$root/runs/minilm_on_glue}")"
binary="${BINARY:+$(from_root "$BINARY")}"
if [[ "$text" != - ]]; then text="$(from_root "$text")"; fi
cd "$root"
dtype="${DTYPE:-bfloat16}" updates="${UPDATES:-6104}" parallel="${PARALLEL:-1}" until="${UNTIL:-}"
split_words chosen "${MODELS:-${names[*]}}"
split_words finetune_flags "${FINETUNE_FLAGS:-}"
split_words tasks "${TASKS:-cola sst2 mrpc stsb rte qnli}"

if [[ ! "$updates" =~ ^[0-9]+$ || "$updates" -le 300 ]]; then
  fail "UPDATES is $updates: give a number above 300"
fi
if [[ ! "$parallel" =~ ^[1-9][0-9]*$ ]]; then
  fail "PARALLEL is $parallel: give a number of finetunings, at least 1"
fi
if [[ -n "$until" && "$until" != pretrained ]]; then
  fail "UNTIL is $until: leave it empty or give pretrained"
fi
for flag in "${finetune_flags[@]}"; do
  if [[ "$flag" != --config.?*=* ]]; then
    fail "FINETUNE_FLAGS has $flag: give flags of the form --config.KEY=VALUE"
  fi
done
is_in() { [[ " ${*:2} " == *" $1 "* ]]; }  # WORD WORDS...
distils() { [[ "${rows[$1]}" == *" distillation="* ]]; }  # MODEL
starts=()  # what is pretrained in binary or imported
if [[ -z "${chosen[*]}" || -n "$(printf '%s\n' "${chosen[@]}" | sort | uniq -d)" ]]; then
  fail "MODELS is '${MODELS:-}': name each model once"
fi
for model in "${chosen[@]}"; do
  if [[ -z "${rows[$model]:-}" ]]; then
    fail "MODELS has $model: choose from ${names[*]}"
  fi
  read -r _ _ start _ <<< "${rows[$model]}"
  if ! is_in "$start" minilm teacher "${starts[@]}"; then starts+=("$start"); fi
done
pretrained=()
for start in "${starts[@]}"; do
  if [[ -z "$binary" || "$start" != bipft_b ]]; then pretrained+=("$start"); fi
done
if [[ "$text" == - && ${#pretrained[@]} -gt 0 ]]; then
  fail "TEXT is -, but MODELS needs the pretraining of ${pretrained[*]}: give its text"
fi
if [[ "$text" != - ]]; then require_text "$text"; fi
if [[ -n "$binary" ]]; then
  require "$binary/config.json" "BINARY is a directory of a pretrained bipft_b"
  if ! is_in bipft_b "${starts[@]}"; then
    fail "no model of MODELS starts from BINARY: leave BINARY empty"
  fi
fi
if is_in bipft_b "${starts[@]}" && [[ -e "$runs/bipft_b" ]]; then
  imported="$(cat "$runs/bipft_b/imported_from" 2> /dev/null || true)"
  if [[ "$imported" != "$binary" ]]; then
    fail "$runs/bipft_b was ${imported:+imported from }${imported:-pretrained there}, and BINARY" \
      "is ${binary:-empty}: give another RUNS"
  fi
fi
for file in config.json vocab.txt model.safetensors; do
  require "$minilm/$file" "MINILM is a directory of all-MiniLM-L6-v2"
done
for task in "${tasks[@]}"; do
  if [[ -z "${glue_directories[$task]:-}" ]]; then
    fail "TASKS has $task: choose from ${!glue_directories[*]}"
  fi
  require_task "$glue" "$task"
  for model in "${chosen[@]}"; do
    if [[ -z "$until" ]] && distils "$model" && ! is_in fp "${chosen[@]}"; then
      require "$runs/fp-$task/result.json" "$model needs its teacher: add fp to MODELS"
    fi
  done
done

install
keep_compiled "$runs"

if [[ ! -e "$runs/minilm/config.json" ]]; then
  rm -rf "$runs/minilm"  # of an import that was stopped
  $python -m bipft_jax.interop.convert import "$minilm" --workdir "$runs/minilm"
fi
if [[ -n "$binary" ]] && is_in bipft_b "${starts[@]}" && [[ ! -e "$runs/bipft_b" ]]; then
  rm -rf "$runs/bipft_b.partial"
  $python -m bipft_jax.interop.convert import "$binary" --recipe bipft_b \
    --workdir "$runs/bipft_b.partial"
  echo "$binary" > "$runs/bipft_b.partial/imported_from"
  mv "$runs/bipft_b.partial" "$runs/bipft_b"
fi

mkdir -p "$runs/results"
pretrain() {  # NAME RECIPE FLAGS...
  local name="$1" recipe="$2"
  shift 2
  train --config="configs/pretrain.py:$recipe,minilm" --workdir="$runs/$name" \
    --config.corpus_dir="$runs/corpus" --config.masking_rate=0.3 --config.dropout=0.0 \
    --config.dtype="$dtype" --config.data_workers="${DATA_WORKERS:-0}" "$@"
  cp "$runs/$name/result.json" "$runs/results/$name.json"
}
flags_of() {  # MODEL: sets recipe, start, rate, and keys as flags
  local words
  read -ra words <<< "${rows[$1]}"
  recipe="${words[1]}" start="${words[2]}" rate="${words[3]}"
  flags=("${words[@]:4}")
  flags=("${flags[@]/#/--config.}")
}
if ((${#pretrained[@]} > 0)); then
  make_corpus "$text" "$runs" --tokenizer "$minilm/vocab.txt" --sequence_length 128
  pretrain fp fp --config.init_from="$runs/minilm" --config.batch_size=256 \
    --config.num_updates=1200 --config.warmup_updates=120 --config.learning_rate=3e-4 \
    --config.evaluate_every=600 --config.log_every=100
fi
for model in "${pretrained[@]}"; do
  flags_of "$model"
  pretrain "$model" "$recipe" --config.init_from="$runs/fp" --config.teacher="$runs/fp" \
    --config.teacher_dropout=False --config.mlm_distillation=1 --config.seed=1 \
    --config.batch_size=128 --config.num_updates="$updates" --config.warmup_updates=300 \
    --config.learning_rate=1e-3 --config.evaluate_every="$((updates / 8))" --config.log_every=109 \
    "${flags[@]}"
done
if is_in bipft_b "${pretrained[@]}" && [[ ! -e "$runs/model/bits.safetensors" ]]; then
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
finetune() {  # MODEL TASK
  local name="$1-$2" log="$runs/$1-$2.log" teacher="$runs/fp-$2" recipe start rate flags
  flags_of "$1"
  if distils "$1"; then
    if [[ ! -e "$teacher/result.json" ]]; then  # a teacher that is not the best yet
      echo "error: $name has no teacher: $teacher is not finished" >&2
      return 1
    fi
    flags+=(--config.teacher="$teacher/seed_0")
    if [[ "$2" == stsb ]] && is_in --config.distillation=bit "${flags[@]}"; then
      flags+=(--config.score_mse=True)
    fi
  fi
  if [[ "$start" == teacher ]]; then start="fp-$2/seed_0"; fi
  if train --config="configs/finetune.py:$recipe,$2" --workdir="$runs/$name" \
    --config.init_from="$runs/$start" --config.glue_dir="$glue" --config.seeds="(${SEEDS:-0,1,2},)" \
    --config.learning_rate="$rate" --config.max_length="${lengths[$2]:-128}" \
    --config.length_buckets=1 --config.schedule=linear --config.max_updates=1000 \
    --config.evaluate_every=250 --config.log_every=250 --config.dtype="$dtype" "${flags[@]}" \
    "${finetune_flags[@]}" > "$log" 2>&1; then
    cp "$runs/$name/result.json" "$runs/results/$name.json"
    echo "$name: finished"
  else
    echo "error: $name failed: see $log" >&2
    return 1
  fi
}
trap 'kill $(jobs -p) 2> /dev/null; wait; exit 143' INT TERM
running=0 failed=false
await_one() {
  wait -n || failed=true
  running=$((running - 1))
}
finetune_all() {  # MODELS...: on every task
  local task model
  for task in "${tasks[@]}"; do
    for model in "$@"; do
      if ((running == parallel)); then await_one; fi
      finetune "$model" "$task" &
      running=$((running + 1))
    done
  done
  while ((running > 0)); do await_one; done
}
others=()
for model in "${chosen[@]}"; do
  if [[ "$model" == fp ]]; then
    finetune_all fp  # the teachers first
  else
    others+=("$model")
  fi
done
finetune_all "${others[@]}"
echo
$python -m bipft_jax.comparison "$runs/results" --output "$runs/results/scores.png"
if $failed; then exit 1; fi
