"""GLUE and tasks like it: tables, files, batches and metrics."""
