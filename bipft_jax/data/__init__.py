"""Text and GLUE data: tokenizers, the prepared corpus, pretraining examples, GLUE batches."""
