#!/usr/bin/env bash
# Makes tiny.safetensors, a packed model that has learned something, and tiny.tsv, the JAX model's
# answers to 100 texts, from the documentation of Python and of this library's packages:
#
#   bash tests/runtime/data/make_tiny.sh RUNS      # 5 minutes of one core
#
# RUNS: a directory for corpus and runs. The documentation differs between versions of Python and of
# the packages, and so do the files. The vocabulary is WordPiece: a sentencepiece model alone would
# be larger than the rest.
set -euo pipefail
cd "$(dirname "$0")/../../.."
runs="$1"
source .venv/bin/activate
mkdir -p "$runs"
python - "$runs/vocab.txt" <<'PYTHON'
import sys

import tokenizers
from bipft_jax.data.corpus.python_docs import PACKAGE_DOCS, training_documents
from bipft_jax.data.tokenizers import SPECIAL_PIECES

backend = tokenizers.BertWordPieceTokenizer(lowercase=True)
texts = [text for _, text in training_documents(PACKAGE_DOCS)]
backend.train_from_iterator(texts, 1200, special_tokens=list(SPECIAL_PIECES), show_progress=False)
pieces = sorted(backend.get_vocab().items(), key=lambda item: item[1])
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.writelines(f"{piece}\n" for piece, _ in pieces)
PYTHON
python -m bipft_jax.data.corpus --input package-docs --output "$runs/corpus" \
  --tokenizer "$runs/vocab.txt" --sequence_length 64
pretraining=(
  --config.corpus_dir="$runs/corpus" --config.batch_size=64 --config.masking_rate=0.3
  --config.learning_rate=2e-3 --config.warmup_updates=50 --config.dropout=0.0
)
python launch/train.py --config=configs/pretrain.py:fp,tiny "${pretraining[@]}" \
  --config.num_updates=500 --workdir="$runs/fp"
python launch/train.py --config=configs/pretrain.py:bipft_b,tiny "${pretraining[@]}" \
  --config.num_updates=300 --config.init_from="$runs/fp" --config.teacher="$runs/fp" \
  --config.mlm_distillation=1.0 --config.seed=1 --workdir="$runs/bipft_b"
python -m bipft_jax.data.glue.documentation --output "$runs/glue"
python launch/train.py --config=configs/finetune.py:bipft_b,documentation \
  --config.init_from="$runs/bipft_b" --config.glue_dir="$runs/glue" --config.max_length=64 \
  --config.length_buckets=1 --config.learning_rate=1e-3 --config.schedule=linear \
  --config.epochs=15 --workdir="$runs/finetuned"
python -m bipft_jax.interop.pack --workdir "$runs/finetuned" \
  --output tests/runtime/data/tiny.safetensors
head -n 101 "$runs/glue/documentation/dev.tsv" | cut -f 1 > "$runs/texts.tsv"
python -m bipft_jax.predict --workdir "$runs/finetuned" --input "$runs/texts.tsv" \
  --output tests/runtime/data/tiny.tsv
