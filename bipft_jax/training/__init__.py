"""The training loop and its parts: update, optimiser, state, sharding, evaluation, telemetry."""
