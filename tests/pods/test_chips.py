"""The table of chips against libtpu, and slices that do not exist."""

import importlib.util

import pytest

from bipft_jax.pods.chips import CHIPS, chip_of
from bipft_jax.pods.compiler import tpu


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu-compiler]'"
)
def test_libtpu_knows_every_chip_with_as_many_devices():
    for name, chip in CHIPS.items():
        shape = chip.small_slices[-1]
        chips = 256 if chip.axes == 2 else 2 * 4 * 4
        _, devices = tpu(f"{name}:{'x'.join(map(str, shape))}")
        assert len(devices) == chips * chip.devices, name
        assert len({tuple(device.coords) for device in devices}) == chips, name
    assert len(tpu("v5e:4x4", slices=2)[1]) == 32


def test_a_slice_that_does_not_exist_is_an_error():
    for topology in ("v5p:4x4x12", "v5p:16x16x24", "v5e:8x16", "tpu7x:2x2x1"):
        assert chip_of(topology).name == topology.partition(":")[0]
    for topology in ("v5e:32x32", "v6e:4x2", "v5p:2x2", "v5p:8x4x4", "v4:16x16x20", "v5p:4x4x6"):
        with pytest.raises(ValueError, match=f"no slice '{topology}'"):
            chip_of(topology)
    with pytest.raises(ValueError, match="v6e has 1x1, 2x2.*16x16$"):
        chip_of("v6e:3x3")
    for topology in ("v9z:2x2", "v5e", "v5e:2xb"):
        with pytest.raises(ValueError, match=f"v4, v5e, v5p, v6e, tpu7x.* not '{topology}'"):
            chip_of(topology)


def test_peaks_are_those_of_the_type_else_of_bfloat16():
    assert CHIPS["v5e"].peak("s8") == pytest.approx(2 * CHIPS["v5e"].peak("bf16"), rel=0.01)
    assert CHIPS["v5e"].peak("f32") == CHIPS["v5e"].peak("bf16") == 197e12
