r"""Looks at a pretraining run on a TPU slice before it is there. Flags only; the logic is in
bipft_jax/pods/.

    python launch/compile_for_tpu.py --config=configs/pretrain.py:bipft_b,base \
        --topology=v5e:16x16 --config.batch_size=16384 --config.dtype=bfloat16 --config.remat=lean

Compiles every program of the run for all chips of the slice, on a machine without a TPU (it needs
`pip install -e '.[tpu-compiler]'`, no corpus and no network; base takes six minutes of one core and
3 GB). Prints for each program its memory and cycles; for the update the collectives, what crosses
the network between slices, the modelled time of a step, tokens/s and the fraction of the peak.
Exits with 1 and the reasons if the run cannot start, or should not: a program does not compile or
fit, a binarised kernel is gathered as floats, a loop waits for the network between slices, a host
makes rows that it does not hold, a batch does not divide.
"""

import functools
import json
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from bipft_jax.command_line import parse_or_exit

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/pretrain.py:RECIPE,SIZE; --config.KEY=VALUE sets a key.",
    lock_config=True,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape of a slice, such as v5e:16x16.")
_SLICES = flags.DEFINE_integer(
    "slices", 1, "Number of such slices, joined by the data centre's network."
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    None,
    "Pieces of the tokenizer; default: the corpus's, without one 30522 (BERT's).",
    lower_bound=1,
)
_LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Tokens of an example; default: the corpus's, without one 128.",
    lower_bound=1,
)
_CURVE = flags.DEFINE_bool("curve", False, "Also weak and strong scaling, 4 to 4,096 chips.")
_FIT = flags.DEFINE_bool(
    "fit",
    False,
    "Also the cheapest remat and the most sequences a device that fit; compiles often.",
)
_USD = flags.DEFINE_float("usd_per_chip_hour", None, "Also the cost of 10^9 tokens.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    """Prints the report; exits with 1 if the run cannot or should not start."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    # Imported late, so that --help and a mistyped flag answer at once.
    from bipft_jax.config_keys import check_keys
    from bipft_jax.data.corpus.corpus import load_corpus
    from bipft_jax.models.recipes import BERT_VOCABULARY
    from bipft_jax.paths import require_local, require_writable
    from bipft_jax.pods import report
    from bipft_jax.pods.inspection import inspect
    from bipft_jax.pods.setting import setting_of

    config, vocab_size, length = _CONFIG.value, _VOCAB_SIZE.value, _LENGTH.value
    try:
        check_keys(config, "pretrain")
        require_local({"json": _JSON.value, **config.to_dict()})
        if _JSON.value is not None:
            require_writable(_JSON.value)
        if config.corpus_dir:
            corpus = load_corpus(config.corpus_dir)
            vocab_size = vocab_size or corpus.tokenizer.vocab_size
            length = length or corpus.sequence_length
        setting = setting_of(
            config, _TOPOLOGY.value, _SLICES.value, vocab_size or BERT_VOCABULARY, length or 128
        )
        say = functools.partial(print, file=sys.stderr, flush=True)
        seen = inspect(setting, say, curve=_CURVE.value, fit=_FIT.value)
        if _JSON.value is not None:
            record = report.record(seen, _USD.value)
            Path(_JSON.value).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        if flags.FLAGS["verbosity"].present:
            raise
        sys.exit(f"error: {error}\n(--verbosity=0 shows where)")
    print(report.text(seen, _USD.value))
    if seen.reasons:
        sys.exit("\n".join(["", *(f"FAILS: {reason}" for reason in seen.reasons)]))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_or_exit)
