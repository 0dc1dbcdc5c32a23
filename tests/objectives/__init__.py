"""The two objectives by the number of outputs, 0 for the heads of pretraining."""

from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP


def objective(outputs):
    return classification(outputs) if outputs else MLM_NSP


def abstract_params(config, outputs):
    return objective(outputs).abstract_params(config)
