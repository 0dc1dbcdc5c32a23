"""Results, tables and plots of finished and running runs."""
