"""Text and GLUE data: tokenizers, the corpus and its examples, tasks and their batches."""
