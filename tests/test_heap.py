"""What the kernel sees of a process that frees and allocates large arrays."""

import os
import subprocess
import sys

import pytest

# Page faults of filling 64 MB for the third time, in a thread as XLA does.
PROGRAM = """
import resource, threading
from bipft_jax.heap import keep_freed_memory
kept = keep_freed_memory()
import numpy as np

def fill():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 23)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(kept, faults[-1])
"""


@pytest.mark.parametrize(
    "variables, kept",
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "4"}, False),
        ({"JAX_PLATFORMS": "tpu,cpu"}, False),
    ],
)
def test_freed_memory_is_used_again_without_page_faults(variables, kept):
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**own, **variables}, capture_output=True, text=True
    )
    said, faults = done.stdout.split()
    assert said == str(kept)
    # NumPy asks for huge pages, of which 64 MB are 32; a few others are the interpreter's.
    assert int(faults) < 10 if kept else int(faults) > 25
