"""The command `python -m bipft_jax.comparison`; see `bipft_jax/reports/comparison.py`."""

from bipft_jax.reports.comparison import main

if __name__ == "__main__":
    main()
