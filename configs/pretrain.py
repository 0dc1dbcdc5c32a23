"""Pretraining: encoders on masked language modelling + next-sentence prediction, decoders on
causal language modelling.

    python launch/train.py --config=configs/pretrain.py:RECIPE,SIZE \
        --config.corpus_dir=DIR --workdir=DIR

RECIPE: fp, bipft_a, bipft_b, bit_w1a1, bit_w1a2, bit_w1a4, bibert. SIZE: tiny, mini, small,
medium, minilm, base, large (`bipft_jax/models/recipes.py` has both tables). Decoders: bitnet_fp,
bitnet_b158, bitnet_b1; tiny, mini, small, 125m ... 30b (`bipft_jax/models/decoder_recipes.py`). DIR
comes from `python -m bipft_jax.data.corpus`, which also fixes the tokenizer and the sequence
length; one corpus serves both, unless its tokenizer keeps case and line ends (for decoders).

Defaults are for a small model from scratch. The published BiPFT recipe for base: batch_size 512,
learning_rate 2e-4, warmup_updates 5000, num_updates 500000 (62500 were effective, SPEC quirk 9),
adam_epsilon 1e-8, weight_decay 0, clip_norm 0, init_from and teacher a full-precision BERT.
"""

import ml_collections

from bipft_jax.points import product


def get_config(arg: str = "bipft_b,mini") -> ml_collections.ConfigDict:
    """arg: "RECIPE,SIZE"."""
    recipe, _, size = arg.partition(",")
    config = ml_collections.ConfigDict()
    config.program = "pretrain"

    # What is learned: a row of bipft_jax/objectives/table.py that is learned from a corpus; for
    # decoders "causal_lm"
    config.objective = "mlm_nsp"

    # Model
    config.recipe = recipe
    config.size = size or "mini"
    config.estimator_rank = -1  # rank of bipft_b's residual estimators; -1: the recipe's, 1
    config.lora_rank = 0  # rank of products added to attention's linears; 0: none
    config.full_precision_weights = False  # of linears; activations and embedding stay binary
    config.dropout = 0.1  # of hidden states and attention probabilities
    config.dtype = "float32"  # of activations, or "bfloat16"; latent weights are always float32
    # Arithmetic of products of codes (compute): "int8", "bfloat16" and "float32" give the same
    # results. Of their gradients (backward): "bfloat16" (within 1 %; of scales, a few) or
    # "float32". "auto": what is fast on this machine (`bipft_jax/quantization/arithmetic.py`).
    config.compute = "auto"
    config.backward = "auto"
    # For TPUs, recipes with 1-bit attention: scores and probabilities never leave the chip. Off,
    # because it compiles for v5e and v6e and is right when interpreted, but has not run on a TPU.
    config.fused_attention = False
    # Of decoders. What is empty is the recipe's.
    config.decoder = ml_collections.ConfigDict()
    config.decoder.gate = ""  # activation of the feed-forward layer's gate: "relu2" or "silu"
    config.decoder.norm = ""  # "block" (with sub-norms), or "linear": a norm in each linear
    # Groups with statistics of their own along the axes that `mesh.tensor` splits: if the mesh axis
    # divides them, no statistic crosses the network. Part of the model: it changes the numbers.
    config.decoder.groups = 1
    config.decoder.tied = True  # whether the head is the embedding
    config.decoder.rope_theta = 0.0  # base of the rotary wavelengths; 0: the size's
    config.decoder.norm_epsilon = 1e-5  # of every norm
    config.decoder.separate_documents = False  # whether attention stops at the end of a document
    # "lean", "dots" and "full" store less and less for the backward pass and recompute the rest
    # (`bipft_jax/models/remat.py`).
    config.remat = "none"
    config.scan_layers = True  # False compiles for minutes, but the program is faster on a TPU

    # Data
    config.corpus_dir = ""
    config.seed = 0  # of parameters, data order, masks and dropout
    # Fraction of tokens to predict; held-out text always uses BERT's 0.15. An update learns more
    # from 0.4, where the text is harder to predict (arXiv:2202.08005).
    config.masking_rate = 0.15
    config.data_workers = 0  # processes that make examples; 0: threads of this one

    # Start
    # Workdir whose best checkpoint to start from, such as an fp model; WORKDIR@UPDATE: that of an
    # update (also in `teacher`)
    config.init_from = ""
    config.unigram_bias = True  # from scratch: MLM bias starts at log word frequency, not at 0
    config.teacher = ""  # workdir of a full-precision model of the same size to distil from
    config.teacher_dropout = True  # the reference's teacher runs with its dropout active
    # Weight of distilling the teacher's distribution of each masked token; above 0, the teacher
    # needs an MLM head. 0, as in the reference: only hidden states and next-sentence distribution.
    config.mlm_distillation = 0.0

    # Devices: the axis `data` splits the batch and takes the devices that fsdp and tensor leave
    config.mesh = ml_collections.ConfigDict()
    config.mesh.fsdp = 1  # splits the batch and the weights: fits larger models
    config.mesh.tensor = 1  # splits heads, feed-forward, vocabulary: for few sequences per device

    # Optimisation, counted in updates
    config.num_updates = 10_000
    config.batch_size = 256  # sequences per update, over all devices
    # Micro-batches per update: less memory, the same update except for dropout and the minimum of
    # 2-bit and 4-bit activations, which each micro-batch computes from its own values
    config.accumulation = 1
    config.learning_rate = 5e-4  # peak; linear warm-up, then linear decay to 0
    # If not 0, from half of the updates on the peak is this times learning_rate, and weight decay
    # is off (two stages, arXiv:2402.17764)
    config.second_peak = 0.0
    config.warmup_updates = 500
    config.adam_b2 = 0.999  # decay of the mean of squared gradients
    config.adam_epsilon = 1e-6  # BERT's own; the BiPFT reference has 1e-8
    config.weight_decay = 0.01  # decoupled, on matrices only
    config.clip_norm = 1.0  # global gradient norm; 0: no clipping
    # An update with a non-finite loss or gradient is skipped; this many in a row, checked every
    # log_every updates, stop the run
    config.max_skipped_updates = 20

    # Output
    config.log_every = 50  # updates; means over them
    config.evaluate_every = 1_000  # updates between held-out evaluations (and checkpoints)
    # Held-out sequences per evaluation, at most 32 per data x fsdp shard at a time; the same on
    # every mesh, except for the remainder of an even split over the shards; 0: all
    config.evaluation_sequences = 1_024
    # Checkpoints, made by evaluations, whose update is a multiple of this are kept besides best and
    # latest, to start from as WORKDIR@UPDATE; 0: none
    config.keep_every = 0
    config.profile_steps = ""  # "10:15" writes WORKDIR/profile, a trace of updates 11 to 15
    if recipe.startswith("bitnet"):
        config.update(_of_decoder(quantised=recipe != "bitnet_fp"))
    return config


def _of_decoder(quantised: bool) -> dict:
    """What the BitNet papers do otherwise. Quantised weights need a larger rate than their
    full-precision twin, for which it would be too large."""
    return dict(
        objective="causal_lm",
        dropout=0.0,
        learning_rate=2e-3 if quantised else 6e-4,
        second_peak=2 / 3 if quantised else 0.0,
        adam_b2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.1,
    )


def get_hyper() -> list[dict]:
    """The points of `launch/sweep.py`: peak learning rates for a small model, two seeds each."""
    return product(learning_rate=(2e-4, 5e-4, 1e-3), seed=(0, 1))
