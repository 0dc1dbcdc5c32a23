"""The command `python -m bipft_jax.plot`; see `bipft_jax/reports/plot.py`."""

from bipft_jax.reports.plot import main

if __name__ == "__main__":
    main()
