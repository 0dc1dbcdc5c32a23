"""What the TPU compiler says of a program: its cost on a chip, and what moves between chips."""
