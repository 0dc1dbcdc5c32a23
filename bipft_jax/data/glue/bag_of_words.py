"""A bag-of-words baseline for each task, which a pretrained model should beat.

A linear model from scikit-learn on TF-IDF weights of single words, fitted to the same training
rows: logistic regression for classes, ridge regression for scores. The two sentences of a pair have
separate features.
"""

import scipy.sparse
import sklearn.feature_extraction.text
import sklearn.linear_model

from bipft_jax.data.glue import metrics as glue_metrics
from bipft_jax.data.glue.tasks import GlueSplit


def scores(train: GlueSplit, dev: GlueSplit) -> dict[str, float]:
    """Fits a model to `train` and returns its metrics on `dev` by name, as `glue_metrics.evaluate`
    computes them. The same rows always give the same scores.

    Raises: ValueError if no training sentence has a word, or all labels are the same.
    """
    train_words, dev_words = [], []
    for train_column, dev_column in _columns(train, dev):
        vectorizer = sklearn.feature_extraction.text.TfidfVectorizer()
        train_words.append(vectorizer.fit_transform(train_column))
        dev_words.append(vectorizer.transform(dev_column))
    if train.task.is_regression:
        model = sklearn.linear_model.Ridge()
    else:
        model = sklearn.linear_model.LogisticRegression(max_iter=1000)
    model.fit(scipy.sparse.hstack(train_words, "csr"), train.labels)
    predictions = model.predict(scipy.sparse.hstack(dev_words, "csr"))
    return glue_metrics.evaluate(train.task, predictions, dev.labels)


def _columns(train: GlueSplit, dev: GlueSplit) -> list[tuple[list[str], list[str]]]:
    columns = [(train.sentences1, dev.sentences1)]
    if train.sentences2 is not None:
        columns.append((train.sentences2, dev.sentences2))
    return columns
