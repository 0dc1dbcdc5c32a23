"""The benchmarks' workload: the pretraining update of a recipe on random data of one shape.

`FAMILIES` is the table of what encoders and decoders do differently.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bipft_jax.data.corpus.pretraining import max_predictions
from bipft_jax.errors import unknown_name
from bipft_jax.models.decoder_recipes import (
    DECODER_RECIPES,
    DECODER_SIZES,
    DecoderConfig,
    decoder_config,
)
from bipft_jax.models.recipes import (
    BERT_VOCABULARY,
    RECIPES,
    SIZES,
    BertConfig,
    bert_config,
)
from bipft_jax.models.remat import REMAT_POLICIES
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.objectives.objective import Objective
from bipft_jax.quantization.arithmetic import COMPUTE_MODES, check_modes
from bipft_jax.training.optimizer import adamw
from bipft_jax.training.state import (
    TrainState,
    abstract_state,
    calibrate,
    initial_params,
    new_state,
)
from bipft_jax.training.step import update


@dataclasses.dataclass(frozen=True)
class Workload:
    """Forward, backward and AdamW of `batch` sequences of `length` tokens.

    size: of the recipe's family. dtype: of activations. backward, remat, scan_layers: as in
    `BertConfig`. dropout: BERT's 0.1, which costs random bits; decoders have none. accumulation:
    micro-batches of an update.
    """

    size: str
    batch: int
    length: int
    dtype: str
    backward: str = "auto"
    remat: str = "none"
    scan_layers: bool = True
    fused_attention: bool = False  # of the recipes that have it
    dropout: float = 0.1
    vocab_size: int = BERT_VOCABULARY
    accumulation: int = 1

    def config(self, recipe: str, compute: str) -> BertConfig | DecoderConfig:
        """The model.

        Raises: ValueError for an unknown recipe, size or compute mode.
        """
        return family_of(recipe).config(
            self,
            recipe,
            dtype=self.dtype,
            compute=compute,
            backward=self.backward,
            remat=self.remat,
            scan_layers=self.scan_layers,
        )

    def variants(
        self, recipes: Sequence[str], compute_modes: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Pairs (recipe, arithmetic of its products): each recipe in each mode, except that a
        recipe without quantised linears, which has no codes to multiply, appears once, with
        `dtype`.

        Raises: ValueError for an unknown recipe or compute mode.
        """
        for mode in compute_modes:
            check_modes(mode, self.backward)
        return [
            (recipe, mode)
            for recipe in recipes
            for mode in (
                [self.dtype]
                if family_of(recipe).recipes[recipe].linear_input is None
                else compute_modes
            )
        ]

    def update(self, config: BertConfig | DecoderConfig) -> Callable[..., Any]:
        """The function (state, teacher's parameters (None), batch) -> (state, metrics)."""
        objective = family_of(config.recipe.name).objective
        model = objective.model(config)
        step = update(objective, model, _optimizer(), accumulation=self.accumulation)

        def with_dropout(state, teacher_params, batch):
            return step(state, teacher_params, 0, batch, True)

        return with_dropout

    def abstract_state(self, config: BertConfig | DecoderConfig) -> TrainState:
        """Shapes and dtypes of the state."""
        objective = family_of(config.recipe.name).objective
        return abstract_state(objective.abstract_params(config), _optimizer())

    def state(self, config: BertConfig | DecoderConfig) -> TrainState:
        """A calibrated state with random weights."""
        recipe, objective = config.recipe.name, family_of(config.recipe.name).objective
        model, inputs = objective.model(config), objective.model_inputs(self.arrays(recipe))
        params = initial_params(model, jax.random.key(0), *inputs)
        return new_state(calibrate(model, params, *inputs), _optimizer())

    def arrays(self, recipe: str) -> dict[str, np.ndarray]:
        """A batch of random tokens without padding for the recipe's objective."""
        return family_of(recipe).arrays(self, np.random.default_rng(0))

    def head_products(self, config: BertConfig | DecoderConfig) -> int:
        """Multiply-adds per sequence outside the layers."""
        from_corpus = family_of(config.recipe.name).objective.from_corpus
        return from_corpus.head_products(config, from_corpus.example(self.length, None))


@dataclasses.dataclass(frozen=True)
class Family:
    """Recipes of one architecture.

    twin: the recipe in full precision, to which the others are compared.
    config: (workload, recipe, fields of the model's configuration) -> the configuration.
    arrays: (workload, random generator) -> a batch of the objective.
    """

    twin: str
    recipes: Mapping[str, Any]
    objective: Objective
    config: Callable[..., BertConfig | DecoderConfig]
    arrays: Callable[[Workload, np.random.Generator], dict[str, np.ndarray]]


def _encoder(workload: Workload, recipe: str, **fields: Any) -> BertConfig:
    row = RECIPES[recipe]
    fused = workload.fused_attention and row.fusible_attention
    sizes = workload.size, workload.vocab_size
    return bert_config(row, *sizes, dropout=workload.dropout, fused_attention=fused, **fields)


def _decoder(workload: Workload, recipe: str, **fields: Any) -> DecoderConfig:
    return decoder_config(DECODER_RECIPES[recipe], workload.size, workload.vocab_size, **fields)


def _pairs(workload: Workload, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two sentences; BERT's 15 % of the tokens are targets."""
    shape, predictions = (workload.batch, workload.length), max_predictions(workload.length)
    ids = rng.integers(1, workload.vocab_size, shape, dtype=np.int32)
    places = np.stack(
        [rng.choice(workload.length, predictions, replace=False) for _ in range(workload.batch)]
    )
    places = np.sort(places, axis=1).astype(np.int32)
    return {
        "input_ids": ids,
        "token_type_ids": (np.arange(workload.length) >= workload.length // 2).astype(np.int32)
        + np.zeros(shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "mlm_positions": places,
        "mlm_ids": np.take_along_axis(ids, places, axis=1),
        "mlm_weights": np.ones(places.shape, np.float32),
        "nsp_labels": rng.integers(0, 2, workload.batch, dtype=np.int32),
    }


def _windows(workload: Workload, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Windows of one text; every token has a target."""
    shape = workload.batch, workload.length + 1
    tokens = rng.integers(1, workload.vocab_size, shape, dtype=np.int32)
    return {
        "input_ids": tokens[:, :-1],
        "target_ids": tokens[:, 1:],
        "target_weights": np.ones(tokens[:, 1:].shape, np.float32),
        "segment_ids": np.ones_like(tokens[:, 1:]),
    }


FAMILIES = (
    Family("fp", RECIPES, MLM_NSP, _encoder, _pairs),
    Family("bitnet_fp", DECODER_RECIPES, CAUSAL_LM, _decoder, _windows),
)


def family_of(recipe: str) -> Family:
    """The family of a recipe. Raises: ValueError naming the nearest known ones."""
    for family in FAMILIES:
        if recipe in family.recipes:
            return family
    raise unknown_name("recipe", recipe, _RECIPES)


_RECIPES = [recipe for family in FAMILIES for recipe in family.recipes]
_SIZES = list(dict.fromkeys([*SIZES, *DECODER_SIZES]))


def _optimizer():
    return adamw(1e-4, weight_decay=0.01, clip_norm=1.0, eps=1e-6)


def add_workload_arguments(
    parser: argparse.ArgumentParser, *, batch: int, dtype: str, remat: str
) -> None:
    """Adds the flags that select what to compile, with the benchmark's own defaults."""
    parser.add_argument("--size", default="base", help="of: %(choices)s", choices=_SIZES)
    parser.add_argument("--batch", type=int, default=batch, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument(
        "--recipes",
        type=names,
        default=["fp", "bipft_a", "bipft_b"],
        help=f"comma-separated, of: {', '.join(_RECIPES)} (default fp,bipft_a,bipft_b)",
    )
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=("float32", "bfloat16"),
        help="of activations (default %(default)s)",
    )
    parser.add_argument(
        "--remat",
        default=remat,
        choices=REMAT_POLICIES,
        help="what layers keep for the backward pass (default %(default)s)",
    )


def workload_of(parsed: argparse.Namespace, **others: Any) -> Workload:
    """The workload that those flags describe. others: further fields."""
    return Workload(
        parsed.size, parsed.batch, parsed.length, parsed.dtype, remat=parsed.remat, **others
    )


def add_compute_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the kinds of arithmetic to compare."""
    parser.add_argument(
        "--compute",
        type=names,
        default=["auto"],
        help="comma-separated kinds of arithmetic for recipes that quantise, of: "
        f"{', '.join(COMPUTE_MODES)} (default auto)",
    )


def names(text: str) -> list[str]:
    """Splits a flag's comma-separated names."""
    return text.split(",")
