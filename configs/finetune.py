"""Finetuning on a GLUE task.

    python launch/train.py --config=configs/finetune.py:RECIPE,TASK \
        --config.init_from=WORKDIR --config.glue_dir=DIR --workdir=DIR

RECIPE: fp, bipft_a, bipft_b, bit_w1a1, bit_w1a2, bit_w1a4, bibert. TASK: cola, sst2, mrpc, stsb,
rte, wnli, qnli, qqp, mnli, all (these nine, with averages over the tasks that papers report), or
documentation (`python -m bipft_jax.data.glue.documentation`). Size and tokenizer come from
`init_from`.

Scores are of the best update on the first dev split; result.json also has those of the last update,
which the reference uses for MNLI-mm (SPEC quirk 14).

Defaults are the published recipe for base (SPEC 2.7): AdamW, constant 2e-5, batch 32, no warm-up,
decay or clipping, the task table's epochs. Small models need a learning rate of 1e-4 to 5e-4, and
binary ones learn more without dropout and in batches of 8 (launch/minilm_on_glue_results).
"""

import ml_collections

from bipft_jax.points import product


def get_config(arg: str = "bipft_b,sst2") -> ml_collections.ConfigDict:
    """arg: "RECIPE,TASK"."""
    recipe, _, task = arg.partition(",")
    config = ml_collections.ConfigDict()
    config.program = "finetune"

    # Model
    config.recipe = recipe
    config.estimator_rank = -1  # rank of bipft_b's residual estimators; -1: the recipe's, 1
    config.lora_rank = 0  # rank of products added to attention's linears; 0: none
    config.full_precision_weights = False  # of linears; activations and embedding stay binary
    # Workdir of a pretraining run, or of one seed of a finetuning run: its best checkpoint;
    # WORKDIR@UPDATE: that of an update, which keep_every of pretraining kept
    config.init_from = ""
    config.pretrained = True  # False takes only size and tokenizer from init_from: the baseline
    config.teacher = ""  # workdir of one seed of a finetuning run on the same task to distil from
    config.distillation = ""  # with a teacher: "bit" or "direction_matching" (BiBERT)
    config.teacher_dropout = False  # BiT's teacher runs with its dropout active, BiBERT's without
    # With a teacher: recipes to finetune before `recipe`, ("bit_w1a2",) in BiT (as a flag:
    # =bit_w1a2, or several as ="('bit_w1a4','bit_w1a2')"). Each trains for as many updates as
    # `recipe`, with the same settings; its best checkpoint initialises and teaches the next.
    config.intermediate_recipes = ()
    # With "bit" on stsb: True takes the squared error to the teacher's score; False, as in BiT's
    # reference, the soft cross entropy of one logit, always 0: pooler and classifier never learn.
    config.score_mse = False
    config.dropout = 0.1  # of hidden states, attention probabilities and the pooled vector
    # True, as in BiBERT's reference: no dropout between an epoch's first evaluation and its end;
    # needs evaluate_every.
    config.dropout_until_evaluation = False
    config.dtype = "float32"  # of activations, or "bfloat16"
    # Arithmetic of products of codes (compute): "int8", "bfloat16" and "float32" give the same
    # results. Of their gradients (backward): "bfloat16" (within 1 %; of scales, a few) or
    # "float32". "auto": what is fast on this machine (`bipft_jax/quantization/arithmetic.py`).
    config.compute = "auto"
    config.backward = "auto"
    # "lean", "dots" and "full" store less and less for the backward pass and recompute the rest
    # (`bipft_jax/models/remat.py`).
    config.remat = "none"

    # Data
    config.task = task or "sst2"
    # Directory with CoLA/, SST-2/, ... as the benchmark ships them, or with glue/cola/, ... as TFDS
    # prepares them (`bipft_jax/data/glue/tfds.py`).
    config.glue_dir = ""
    config.max_length = 128  # tokens; longer sentences are cut, pairs longest first
    # Number of padded lengths: the longest, its half, quarter, ...; each compiles once, and batches
    # hold sentences of like length. 1, as in the references: one length, batches of mixed lengths.
    config.length_buckets = 4
    config.seeds = (0,)  # one finetuning per seed: of classifier, data order and dropout

    # Devices: the axis `data` splits the batch and takes the devices that fsdp and tensor leave
    config.mesh = ml_collections.ConfigDict()
    config.mesh.fsdp = 1  # splits the batch and the weights: fits larger models
    config.mesh.tensor = 1  # splits heads, feed-forward, vocabulary: for few sequences per device

    # Optimisation
    config.epochs = 0  # passes over the training split; 0: the task table's
    config.max_updates = 0  # stop after this many updates; 0: after the epochs
    config.batch_size = 32  # sequences per update, over all devices
    # Micro-batches per update: less memory, the same update except for dropout and the minimum of
    # 2-bit and 4-bit activations, which each micro-batch computes from its own values
    config.accumulation = 1
    config.optimizer = "adamw"  # or "bert_adam", BiT's and BiBERT's: clips every tensor to norm 1
    config.learning_rate = 2e-5
    config.scale_learning_rate = 0.0  # of learned scales, with bert_adam; 0: learning_rate
    config.schedule = "constant"  # or "linear": warm-up for a tenth of the run, then decay to 0
    config.weight_decay = 0.0  # decoupled, on matrices only
    config.clip_norm = 0.0  # global gradient norm, with adamw; 0: no clipping
    # An update with a non-finite loss or gradient is skipped; this many in a row, checked every
    # log_every updates, stop the run
    config.max_skipped_updates = 20

    # Output
    config.log_every = 50  # updates
    config.evaluate_every = 0  # updates between evaluations (and checkpoints); 0: every epoch
    config.profile_steps = ""  # "10:15" writes SEED/profile, a trace of updates 11 to 15
    return config


def get_hyper() -> list[dict]:
    """The points of `launch/sweep.py`: learning rates for a small model, two seeds each."""
    return product(learning_rate=(1e-4, 3e-4, 1e-3), seeds=((0,), (1,)))
