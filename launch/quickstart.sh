#!/usr/bin/env bash
# Trains and finetunes a 1-bit BERT on this machine. Needs only Python; downloads no data.
#
#   bash launch/quickstart.sh [DIRECTORY] [--config.KEY=VALUE ...]
#
# DIRECTORY: of the results; default runs/quickstart in this checkout. The flags go to every run of
# pretraining and finetuning and win over the values below. They are keys that both configs have,
# such as --config.compute=float32 --config.backward=float32
# Run it again: finished steps are not repeated, an interrupted one goes on.
#
# Text: the documentation of Python and of five packages that this library requires. Task: classify
# which of these six a sentence from a held-out document is about, from 20 labelled sentences of each.
set -euo pipefail
source "$(dirname "$0")/experiment.sh"
need_arguments 0 "$@"
runs=runs/quickstart
if [[ $# -gt 0 && "$1" != -* ]]; then
  runs="$(from_root "$1")"
  shift
fi
cd "$root"
install
# Before minutes are spent: every flag is one of both kinds of runs.
$python - "$@" <<'PYTHON'
import re, sys

sys.path.insert(0, "")
from configs import finetune, pretrain

for flag in sys.argv[1:]:
    key = re.match(r"--config\.([\w.]+)=", flag)
    if not key:
        sys.exit(f"error: {flag}: flags here are of the form --config.KEY=VALUE")
    for program in (pretrain, finetune):
        values = program.get_config().to_dict()
        for part in key[1].split("."):
            if part not in values:
                sys.exit(f"error: {flag}: configs/{program.__name__.partition('.')[2]}.py has no {key[1]}")
            values = values[part]
PYTHON
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo; echo "== 1. corpus: text to shards of token blocks"
$python -m bipft_jax.data.corpus --input package-docs --output "$runs/corpus" \
  --tokenizer sentencepiece:4096 --sequence_length 64

pretraining=(
  --config.corpus_dir="$runs/corpus" --config.batch_size=64 --config.masking_rate=0.3
  --config.learning_rate=2e-3 --config.warmup_updates=100 --config.dropout=0.0
  --config.log_every=100 --config.evaluate_every=500
)
echo; echo "== 2. pretraining, MLM + NSP: fp (full precision), tiny"
train --config=configs/pretrain.py:fp,tiny --workdir="$runs/fp" \
  "${pretraining[@]}" --config.num_updates=1000 "$@"

echo; echo "== 3. pretraining: bipft_b (1-bit weights and activations), from fp and taught by it"
train --config=configs/pretrain.py:bipft_b,tiny --workdir="$runs/bipft_b" \
  "${pretraining[@]}" --config.num_updates=500 --config.init_from="$runs/fp" \
  --config.teacher="$runs/fp" --config.mlm_distillation=1.0 --config.seed=1 "$@"

echo; echo "== 4. what it has learned"
$python -m bipft_jax.fill_mask --workdir "$runs/bipft_b" \
  "Return a new [MASK] object containing the result."

echo; echo "== 5. finetuning: which package is a sentence about? Pretrained, and the same model not pretrained"
$python -m bipft_jax.data.glue.documentation --output "$runs/glue" --train 20
finetuning=(
  --config=configs/finetune.py:bipft_b,documentation --config.init_from="$runs/bipft_b"
  --config.glue_dir="$runs/glue" --config.max_length=64 --config.length_buckets=1
  --config.learning_rate=1e-3 --config.schedule=linear --config.epochs=40
  --config.evaluate_every=50 --config.seeds="(0,1)"
)
train "${finetuning[@]}" --workdir="$runs/finetuned" "$@"
train "${finetuning[@]}" --workdir="$runs/not-pretrained" \
  --config.pretrained=False "$@"

echo; echo "== 6. what pretraining was worth"
$python -m bipft_jax.comparison "$runs/finetuned" "$runs/not-pretrained" --glue_dir "$runs/glue"
$python - "$runs/bipft_b/result.json" <<'PYTHON'
import json, sys
best = json.load(open(sys.argv[1]))["seeds"][0]["best"]
print(
    f"Held-out perplexity of the 1-bit model: {best['mlm_perplexity']:.0f}; when predicting by "
    f"word frequency: {best['unigram_perplexity']:.0f}."
)
PYTHON

cat <<TEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
Everything is in $runs: metrics.jsonl, tensorboard/ and checkpoints/ of each run.
How to go on (README.md has more):
  source .venv/bin/activate
  python -m bipft_jax.fill_mask --workdir $runs/bipft_b "The value of this [MASK] is ignored."
  python -m bipft_jax.plot $runs/fp $runs/bipft_b --output curves.png
  python -m bipft_jax.data.corpus --help          # your own text
  python launch/train.py --config=configs/pretrain.py:fp,mini --config.corpus_dir=DIR --workdir=DIR
TEXT
