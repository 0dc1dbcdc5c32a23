"""What finished and running runs have reached: results, tables and pictures."""
