"""Binary (1-bit weights, 1-bit activations) BERT: pretraining and GLUE finetuning in JAX."""
