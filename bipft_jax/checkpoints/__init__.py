"""A run's files: its checkpoints, its source, its workdir. Only this package imports Orbax."""
