"""What a model learns: one file for each objective, and the table of them."""
