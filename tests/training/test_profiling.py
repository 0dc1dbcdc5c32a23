"""Which updates a trace has, read back with jax's own reader; wrong ranges."""

import jax
import jax.numpy as jnp
import pytest

from bipft_jax.training.profiling import profiling


def test_a_trace_has_the_updates_of_its_range_alone(tmp_path, capsys):
    with profiling("2:4", str(tmp_path)) as profile:
        x = jnp.ones(3)
        profile.after(0, x)
        for step in range(1, 7):
            with jax.profiler.TraceAnnotation(f"update number {step}"):
                x = x + 1
            profile.after(step, x)
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert {name for name in names if name.startswith("update number")} == {
        "update number 3",
        "update number 4",
    }
    assert "a trace of updates 3 to 4" in capsys.readouterr().out


def test_a_run_that_ends_in_its_range_writes_its_trace(tmp_path):
    with pytest.raises(RuntimeError, match="the loop"), profiling("0:9", str(tmp_path)) as profile:
        profile.after(0, None)
        raise RuntimeError("the loop")
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("steps", ["7", "5:5", "9:3", "a:b", "1:2:3"])
def test_another_range_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="profile_steps is .* as 10:15"), profiling(steps, "x"):
        pass
