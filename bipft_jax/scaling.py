"""The command `python -m bipft_jax.scaling`; see `bipft_jax/reports/scaling.py`."""

from bipft_jax.reports.scaling import main

if __name__ == "__main__":
    main()
