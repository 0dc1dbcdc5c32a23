#!/usr/bin/env bash
# Trains a decoder with weights -1, 0, 1 on this machine. Needs only Python; downloads no data.
#
#   bash launch/bitnet_tiny.sh [RUNS]
#
# RUNS (default runs/bitnet_tiny) receives everything. Run it again: finished steps are not repeated,
# an interrupted one goes on. It trains bitnet_b158 and its full-precision twin bitnet_fp, both tiny,
# on the documentation of Python and of five packages that this library requires. Then it prints
# held-out bits a byte beside those of a 3-gram model and of the unigrams, and a sample of text.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "$0")/.."
runs="${1:-runs/bitnet_tiny}"
source launch/environment.sh
prepare_environment ""
python=.venv/bin/python
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo; echo "== 1. corpus: text to shards of token blocks"
$python -m bipft_jax.data.corpus --input package-docs --output "$runs/corpus" \
  --tokenizer sentencepiece:2048 --sequence_length 128

pretrain() {  # RECIPE RATE
  echo; echo "== pretraining $1"
  $python launch/train.py --config="configs/pretrain.py:$1,tiny" --workdir="$runs/$1" \
    --config.corpus_dir="$runs/corpus" --config.batch_size=8 --config.num_updates=2000 \
    --config.learning_rate="$2" --config.warmup_updates=100 \
    --config.log_every=200 --config.evaluate_every=1000
}
pretrain bitnet_b158 8e-3
pretrain bitnet_fp 2e-3

echo; echo "== what they have learned: held-out text, and a continuation of \"Return a new\""
$python -m bipft_jax.baselines "$runs/bitnet_b158" "$runs/bitnet_fp"
echo
$python -m bipft_jax.generate --workdir "$runs/bitnet_b158" "Return a new"
