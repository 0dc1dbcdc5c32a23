"""Measurements of speed, one module per claim: `python -m bipft_jax.benchmarks.NAME`."""
