"""Every test runs on CPU with eight fake devices, and under strict promotion: no type changes and
no axis appears unless the code says so. Nothing is downloaded.

All of it is environment, so that it holds in the commands that tests start as well.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tiny programs: compiling is what takes the time
    ]
)
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import pytest  # noqa: E402 (after the environment)

from tests import launching  # noqa: E402


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A directory with corpus/ and glue/, for `launching`'s commands."""
    home = tmp_path_factory.mktemp("home")
    launching.furnish(home)
    return home


@pytest.fixture(scope="session")
def pretrained(home):
    """The workdir of a run that nothing disturbed."""
    launching.run(home, launching.CONFIG, home / "whole", **launching.PRETRAIN)
    return home / "whole"
