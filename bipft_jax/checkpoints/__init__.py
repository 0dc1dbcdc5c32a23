"""A run's files: checkpoints, what a run starts from, and its workdir. Nothing else knows Orbax."""
