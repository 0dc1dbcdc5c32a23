"""One BERT encoder, driven by recipes."""
