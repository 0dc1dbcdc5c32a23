"""Losses, optimiser, state, sharding, checkpoints and telemetry of the two training loops."""
