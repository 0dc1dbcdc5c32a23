"""The benchmarks' workload: the pretraining update of a recipe on random data of one shape."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bipft_jax.data.corpus.pretraining import max_predictions
from bipft_jax.models.recipes import (
    BERT_VOCABULARY,
    RECIPES,
    SIZES,
    BertConfig,
    bert_config,
    recipe_named,
)
from bipft_jax.models.remat import REMAT_POLICIES
from bipft_jax.objectives.mlm_nsp import MLM_NSP
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

    size: a key of `models.recipes.SIZES`. dtype: of activations. backward, remat, scan_layers: as
    in `BertConfig`. dropout: BERT's 0.1, which costs random bits.
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

    def config(self, recipe: str, compute: str) -> BertConfig:
        """The model.

        Raises: ValueError for an unknown recipe, size or compute mode.
        """
        row = recipe_named(recipe)
        return bert_config(
            row,
            self.size,
            self.vocab_size,
            dropout=self.dropout,
            dtype=self.dtype,
            compute=compute,
            backward=self.backward,
            fused_attention=self.fused_attention and row.fusible_attention,
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
                [self.dtype] if recipe_named(recipe).linear_input is None else compute_modes
            )
        ]

    def update(self, config: BertConfig) -> Callable[..., Any]:
        """The function (state, teacher's parameters (None), batch) -> (state, metrics)."""
        step = update(MLM_NSP, MLM_NSP.model(config), _optimizer())

        def with_dropout(state, teacher_params, batch):
            return step(state, teacher_params, 0, batch, True)

        return with_dropout

    def abstract_state(self, config: BertConfig) -> TrainState:
        """Shapes and dtypes of the state."""
        return abstract_state(MLM_NSP.abstract_params(config), _optimizer())

    def state(self, config: BertConfig) -> TrainState:
        """A calibrated state with random weights."""
        model, inputs = MLM_NSP.model(config), MLM_NSP.model_inputs(self.arrays())
        params = initial_params(model, jax.random.key(0), *inputs)
        return new_state(calibrate(model, params, *inputs), _optimizer())

    def arrays(self) -> dict[str, np.ndarray]:
        """A batch of random tokens without padding; BERT's 15 % of them are targets."""
        rng = np.random.default_rng(0)
        shape, predictions = (self.batch, self.length), self.predictions
        ids = rng.integers(1, self.vocab_size, shape, dtype=np.int32)
        places = np.stack(
            [rng.choice(self.length, predictions, replace=False) for _ in range(self.batch)]
        )
        places = np.sort(places, axis=1).astype(np.int32)
        return {
            "input_ids": ids,
            "token_type_ids": (np.arange(self.length) >= self.length // 2).astype(np.int32)
            + np.zeros(shape, np.int32),
            "attention_mask": np.ones(shape, np.int32),
            "mlm_positions": places,
            "mlm_ids": np.take_along_axis(ids, places, axis=1),
            "mlm_weights": np.ones(places.shape, np.float32),
            "nsp_labels": rng.integers(0, 2, self.batch, dtype=np.int32),
        }

    @property
    def predictions(self) -> int:
        """Number of masked positions per sequence."""
        return max_predictions(self.length)


def _optimizer():
    return adamw(1e-4, weight_decay=0.01, clip_norm=1.0, eps=1e-6)


def add_workload_arguments(
    parser: argparse.ArgumentParser, *, batch: int, dtype: str, remat: str
) -> None:
    """Adds the flags that select what to compile, with the benchmark's own defaults."""
    parser.add_argument("--size", default="base", help="of: %(choices)s", choices=SIZES)
    parser.add_argument("--batch", type=int, default=batch, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument(
        "--recipes",
        type=names,
        default=["fp", "bipft_a", "bipft_b"],
        help=f"comma-separated, of: {', '.join(RECIPES)} (default fp,bipft_a,bipft_b)",
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
