"""What the kernel sees of a process that frees and allocates large arrays."""

import os
import subprocess
import sys

import pytest

# Page faults of filling 64 MB for the third time, in a thread as XLA does.
PROGRAM = """
import resource, sys, threading
from bipft_jax import heap
heap._ACCELERATORS = sys.argv[1:]
kept = heap.keep_freed_memory()
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
    "variables, device, kept",
    [
        ({"JAX_PLATFORMS": "cpu"}, "/", True),
        ({"JAX_PLATFORMS": ""}, "/no-such-device*", True),
        ({"JAX_PLATFORMS": ""}, "/*", False),
        ({"JAX_PLATFORMS": "tpu,cpu"}, "/no-such-device*", False),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "4"}, "/", False),
    ],
)
def test_freed_memory_is_used_again_without_page_faults(variables, device, kept):
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env={**own, **variables},
        capture_output=True,
        text=True,
    )
    returned, faults = done.stdout.split()
    assert returned == str(kept)
    # NumPy asks for huge pages, of which 64 MB are 32; a few others are the interpreter's.
    assert int(faults) < 10 if kept else int(faults) > 25
