"""The loop and what it calls: update, optimiser, state, sharding, evaluation, telemetry."""
