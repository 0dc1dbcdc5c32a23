#!/usr/bin/env bash
# From nothing to a finetuned 1-bit BERT on this machine, with Python only: no data is downloaded.
#
#   bash launch/quickstart.sh [DIRECTORY]      default: runs/quickstart
#
# Text: the prose of Python's own documentation. Task: real sentences of it, kept out of
# pretraining, against the same with two words swapped. Run it again: finished steps are not
# repeated, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment ""
python=.venv/bin/python
runs="${1:-runs/quickstart}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo; echo "== 1. corpus: text to shards of token blocks"
$python -m bipft_jax.data.corpus --input python-docs --output "$runs/corpus" \
  --tokenizer sentencepiece:4096 --sequence_length 64

pretraining=(
  --config.corpus_dir="$runs/corpus" --config.num_updates=800 --config.batch_size=64
  --config.learning_rate=2e-3 --config.warmup_updates=100 --config.dropout=0.0
  --config.log_every=100 --config.evaluate_every=400
)
echo; echo "== 2. pretraining, MLM + NSP: fp (full precision), tiny"
$python launch/train.py --config=configs/pretrain.py:fp,tiny --workdir="$runs/fp" \
  "${pretraining[@]}"

echo; echo "== 3. pretraining: bipft_b (1-bit weights and activations), from fp and taught by it"
$python launch/train.py --config=configs/pretrain.py:bipft_b,tiny --workdir="$runs/bipft_b" \
  "${pretraining[@]}" --config.init_from="$runs/fp" --config.teacher="$runs/fp" --config.seed=1

echo; echo "== 4. what it has learned"
$python -m bipft_jax.fill_mask --workdir "$runs/bipft_b" \
  "Return a new [MASK] object containing the result."

echo; echo "== 5. finetuning: is the word order of a sentence real?"
$python -m bipft_jax.data.acceptability --output "$runs/glue"
$python launch/train.py --config=configs/finetune.py:bipft_b,acceptability \
  --workdir="$runs/finetune" --config.init_from="$runs/bipft_b" --config.glue_dir="$runs/glue" \
  --config.max_length=64 --config.learning_rate=5e-4 --config.epochs=10 --config.schedule=linear

cat <<TEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
Everything is in $runs: metrics.jsonl, tensorboard/ and checkpoints/ of each run.
How to go on (README.md has more):
  source .venv/bin/activate
  python -m bipft_jax.fill_mask --workdir $runs/bipft_b "The value of this [MASK] is ignored."
  python -m bipft_jax.data.corpus --help          # your own text
  python launch/train.py --config=configs/pretrain.py:fp,mini --config.corpus_dir=DIR --workdir=DIR
TEXT
