"""Weights of other systems, in and out, and comparison with their numbers."""
