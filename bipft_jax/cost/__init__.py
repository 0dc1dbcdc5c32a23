"""What a model costs on paper: bytes, operations and arithmetic energy of one forward pass."""
