"""GLUE and tasks like it: tables, files, batches and metrics. From Python, a task's rows are
`read_split(glue_task("rte"), "data/glue", "train")`."""

from bipft_jax.data.glue.tasks import TASKS, GlueSplit, GlueTask, glue_task, read_split

__all__ = ["TASKS", "GlueSplit", "GlueTask", "glue_task", "read_split"]
