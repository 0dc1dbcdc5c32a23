"""The command `python -m bipft_jax.data.corpus`: see `bipft_jax/data/corpus/command.py`."""

from bipft_jax.data.corpus.command import main

if __name__ == "__main__":
    main()
