"""A small trained model and the JAX model's answers, both made by data/make_tiny.sh: the answers of
every instruction set, and of NumPy, without JAX."""

from pathlib import Path

import numpy as np
import pytest
from bipft_runtime import Model, library

DATA = Path(__file__).parent / "data"
PATH = DATA / "tiny.safetensors"


def expected():
    """(texts, labels, probabilities [texts, labels] with 4 digits)."""
    rows = [line.split("\t") for line in (DATA / "tiny.tsv").read_text().splitlines()[1:]]
    probabilities = np.array([[float(cell) for cell in row[2:]] for row in rows])
    return [row[0] for row in rows], [row[1] for row in rows], probabilities


@pytest.mark.filterwarnings("ignore:text .* was cut", "ignore:NumPy answers")
@pytest.mark.parametrize("name", [*library.instruction_sets(), "numpy"])
def test_answers_are_those_of_the_jax_model(name, monkeypatch):
    if name == "numpy":
        monkeypatch.setattr(library, "loaded", lambda: None)
    else:
        monkeypatch.setenv(library.ISA_VARIABLE, name)
    texts, labels, probabilities = expected()
    model = Model(PATH)
    assert model.instruction_set == name
    answers = model.predict(texts)
    assert [answer.label for answer in answers] == labels
    ours = np.array([list(answer.probabilities.values()) for answer in answers])
    np.testing.assert_allclose(ours, probabilities, rtol=0, atol=1e-4)
