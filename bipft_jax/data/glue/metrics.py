"""GLUE scores, from scikit-learn and scipy, and the baseline of a constant prediction.

Early in finetuning, a binary model often predicts one class for everything. That is a result to
report, not an error: a correlation that is undefined because one side is constant counts as 0, as
the Matthews coefficient does in scikit-learn.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats
import sklearn.metrics

from bipft_jax.data.glue.tasks import GlueSplit, GlueTask


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Fraction of correct predictions, 0 to 1."""
    return float(sklearn.metrics.accuracy_score(labels, predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1 (paraphrase / duplicate); 0.0 if no label and no prediction is class 1."""
    return float(sklearn.metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation coefficient, -1 to 1; 0.0 if labels or predictions are constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation, -1 to 1; 0.0 (not nan) if labels or predictions are constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(scipy.stats.pearsonr(labels, predictions).statistic)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman rank correlation, -1 to 1; 0.0 (not nan) if labels or predictions are constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(scipy.stats.spearmanr(labels, predictions).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate(task: GlueTask, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, in the table's order (the selection metric first).

    Args:
        task: a row of the task table.
        outputs: the model's outputs for N examples: logits [N, C] or class numbers [N] of a
            classification task, scores [N] or [N, 1] of a regression task, without the padding
            rows (weight 0) of the last evaluation batch.
        labels: [N] class numbers or scores.

    Raises:
        ValueError: if the outputs do not fit the labels, or are not finite.
    """
    # float64, so that two equal-looking float32 scores are compared at scipy's own precision.
    outputs, labels = np.asarray(outputs, np.float64), np.asarray(labels, np.float64)
    shapes = {(len(labels),), (len(labels), task.num_outputs)}
    if labels.ndim != 1 or not len(labels) or outputs.shape not in shapes:
        raise ValueError(
            f"task {task.name}: outputs of shape {outputs.shape} do not fit labels of shape "
            f"{labels.shape}; expected [N] or [N, {task.num_outputs}] with N > 0"
        )
    if not np.isfinite(outputs).all():
        raise ValueError(
            f"task {task.name}: {np.count_nonzero(~np.isfinite(outputs))} of {outputs.size} model "
            "outputs are NaN or infinite: training has diverged, lower the learning rate"
        )
    if outputs.ndim == 2:
        outputs = outputs[:, 0] if task.is_regression else outputs.argmax(axis=1)
    if not task.is_regression:
        outputs, labels = outputs.astype(np.int64), labels.astype(np.int64)
    return {name: METRICS[name](labels, outputs) for name in task.metrics}


def baseline(train: GlueSplit, dev: GlueSplit) -> dict[str, float]:
    """The same metrics for one constant prediction for every dev example.

    The prediction is the most frequent class of the *training* split (the lowest class number on a
    tie), or its mean score for regression, whose correlations are 0 by definition.
    """
    if train.task.is_regression:
        answer = float(train.labels.mean(dtype=np.float64))
    else:
        answer = int(np.bincount(train.labels).argmax())
    return evaluate(train.task, np.full(len(dev), answer), dev.labels)


def _constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[0]))
