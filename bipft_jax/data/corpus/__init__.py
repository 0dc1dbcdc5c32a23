"""A corpus: text, sentences, blocks, and the examples of pretraining made of them."""
