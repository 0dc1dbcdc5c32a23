"""Import and export of other systems' weights, and comparison with the references."""
