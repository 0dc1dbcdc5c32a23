#!/usr/bin/env bash
# Trains a decoder with weights -1, 0, 1 on this machine. Needs only Python; downloads no data.
#
#   bash launch/bitnet_tiny.sh [RUNS]
#
# RUNS (default runs/bitnet_tiny) receives everything. Run it again: finished steps are not repeated,
# an interrupted one goes on. It trains bitnet_b158 and its full-precision twin bitnet_fp, both tiny,
# on the documentation of Python and of five packages that this library requires. Then it prints
# held-out bits a byte beside those of n-gram models and of the unigrams, and a sample of text.
# Variables of the environment:
#
#   UPDATES=4000    of 4 sequences of 128 tokens, at least 20; another number needs another RUNS
#
# Measured on 2 cores of an AMD EPYC (Zen 5: AVX512-BF16 and VNNI, no AMX), Python 3.11, jax 0.10.2,
# while other programs used them: 3.9 minutes of CPU time for bitnet_b158, 4.0 for bitnet_fp, half a
# minute for the corpus. Held-out bits a byte: bitnet_b158 1.712, bitnet_fp 1.707, 3-gram 1.592,
# 2-gram 1.740, unigram 2.365: so little training does not reach three counted tokens.
set -euo pipefail
source "$(dirname "$0")/experiment.sh"
need_arguments 0 "$@"
runs="$(from_root "${1:-$root/runs/bitnet_tiny}")" updates="${UPDATES:-4000}"
cd "$root"
if [[ ! "$updates" =~ ^[0-9]+$ || "$updates" -lt 20 ]]; then
  fail "UPDATES is $updates: give a number of at least 20"
fi
install
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo; echo "== 1. corpus: text to shards of token blocks, with case and line ends"
$python -m bipft_jax.data.corpus --input package-docs --output "$runs/corpus" \
  --tokenizer sentencepiece-cased:4096 --sequence_length 128

pretrain() {  # RECIPE RATE
  train --config="configs/pretrain.py:$1,tiny" --workdir="$runs/$1" \
    --config.corpus_dir="$runs/corpus" --config.batch_size=4 --config.num_updates="$updates" \
    --config.learning_rate="$2" --config.warmup_updates="$((updates / 20))" \
    --config.log_every="$((updates / 20))" --config.evaluate_every="$((updates / 2))"
}
echo; echo "== 2. pretraining: bitnet_b158 (weights -1, 0, 1; 8-bit activations)"
pretrain bitnet_b158 4e-3
echo; echo "== 3. pretraining: bitnet_fp (the same in full precision)"
pretrain bitnet_fp 2e-3

echo; echo "== 4. what they have learned"
$python -m bipft_jax.baselines "$runs/bitnet_b158" "$runs/bitnet_fp"
echo; echo "== 5. what bitnet_b158 writes"
$python -m bipft_jax.generate --workdir "$runs/bitnet_b158" --temperature 0.6 "Return a new"

echo; echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Everything is in $runs."
