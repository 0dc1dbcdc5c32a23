"""Which updates a trace has, read back with jax's own reader; wrong ranges."""

import subprocess
import sys

import jax
import pytest

from bipft_jax.training.profiling import profiling

# In a process of its own: the profiler looks into everything else that a process has loaded.
LOOP = """
import sys, jax, jax.numpy as jnp
from bipft_jax.training.profiling import profiling

with profiling("2:4", sys.argv[1]) as profile:
    x = jnp.ones(3)
    profile.after(0, x)
    for step in range(1, int(sys.argv[2]) + 1):
        with jax.profiler.TraceAnnotation(f"update number {step}"):
            x = x + 1
        profile.after(step, x)
    sys.exit("left early")
"""


@pytest.mark.parametrize(("updates", "traced"), [(6, {3, 4}), (3, {3})])
def test_a_trace_has_the_updates_of_its_range_that_were_made(updates, traced, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path), str(updates)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "left early" in done.stderr and f"a trace of updates 3 to {max(traced)}:" in done.stdout
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    found = {name for name in names if name.startswith("update number")}
    assert found == {f"update number {step}" for step in traced}


@pytest.mark.parametrize("steps", ["7", "5:5", "9:3", "a:b", "1:2:3"])
def test_another_range_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="profile_steps is .* as 10:15"), profiling(steps, "x"):
        pass
