"""The table of TPU chips: what is published of them, what libtpu says, and what is inferred.

Rates are those of a *device* of JAX where the field says so (tpu7x has two devices a chip), else of
a chip. Where a page of Google Cloud is the source, it is docs.cloud.google.com/tpu/docs/NAME.

Clocks are not published except v4's (1.05 GHz). Here they are what the published bfloat16 peak
needs with the chip's matrix units (MXU), at 2 operations a cell and cycle. The other end of
`clock_range` is the clock at which libtpu's own schedule (0.0.52) of a product of 8192 x 8192 and
8192 x 8192 in int8 or bfloat16, whichever is longer, takes the time of the published peak; for v4
it gives 1.09 GHz. So ratios of cycles on one chip are better known than seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A row of the table.

    name: libtpu's prefix of topologies ("v5e:2x2"). devices: of JAX, a chip. chip_config: libtpu's
    `chip_config_name`, or "". chips_a_host: of a slice of several hosts.
    clock: Hz, which converts cycles to seconds. clock_range: the lowest and highest that fit what
    is known. peaks: operations/s of a device by HLO element type; `peak` has those of other types.
    bandwidth: bytes/s of a device's HBM. hbm: bytes of it that a program can use.
    axes: dimensions of the torus. link: bytes/s one way over one link of the interconnect (ICI); a
    chip has 2 x `axes` links. ring: an axis is a ring (its ends are joined) if its length is a
    multiple of this, else a line. dcn: bytes/s one way between a chip and the data-centre network.
    small_slices: shapes below a cube of 4 x 4 x 4, or all shapes if `axes` is 2. most_chips: of a
    slice.
    """

    name: str
    devices: int
    chip_config: str
    chips_a_host: int
    clock: float
    clock_range: tuple[float, float]
    peaks: Mapping[str, float]
    bandwidth: float
    hbm: int
    axes: int
    link: float
    ring: int
    dcn: float
    small_slices: tuple[tuple[int, ...], ...]
    most_chips: int

    def peak(self, element: str) -> float:
        """Operations/s of a device for products of an HLO element type ("bf16", "s8", "f32"). A
        type without a rate of its own in `peaks` is multiplied as bfloat16, as float32 is by
        default on TPU."""
        return self.peaks.get(element, self.peaks["bf16"])

    def has_slice(self, shape: tuple[int, ...]) -> bool:
        """Whether slices of this shape exist. libtpu accepts more (v5e:32x32).

        shape: chips along each axis.
        """
        if shape in self.small_slices:
            return True
        return (
            self.axes == 3
            and len(shape) == 3
            and all(length % 4 == 0 for length in shape)
            and list(shape) == sorted(shape)
            and 64 <= math.prod(shape) <= self.most_chips
        )


# Published for v5e and v6e as the whole list.
_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Below a cube; above it every sorted shape of multiples of 4 (the pages list the common ones).
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def _peaks(**rates: float) -> Mapping[str, float]:
    return MappingProxyType(rates)


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                "v4",
                devices=1,  # as one device of two cores; by default libtpu shows two
                chip_config="megacore",
                chips_a_host=4,
                # Published (Jouppi et al. 2023, arXiv 2304.01433, table 4): 1,050 MHz.
                clock=1.05e9,
                clock_range=(1.05e9, 1.05e9),
                peaks=_peaks(bf16=275e12, s8=275e12),  # page v4: bf16 or int8
                bandwidth=1200e9,  # page v4
                hbm=int(30.75 * _GIB),  # libtpu; published: 32 GiB
                axes=3,
                link=50e9,  # arXiv 2304.01433: 50 GB/s a link and direction
                ring=4,
                dcn=50e9 / 8,  # not published: as v5p
                small_slices=_BELOW_A_CUBE,
                most_chips=4096,  # page v4: a pod
            ),
            Chip(
                "v5e",
                devices=1,
                chip_config="",
                chips_a_host=4,  # of a slice of several hosts (ct5lp-hightpu-4t)
                # Not published: 4 MXU of 128 x 128.
                clock=1.5e9,
                clock_range=(1.46e9, 1.5e9),
                peaks=_peaks(bf16=197e12, s8=393e12),  # page v5e
                bandwidth=819e9,  # page v5e
                hbm=int(15.75 * _GIB),  # libtpu's out-of-memory message
                axes=2,
                link=50e9,  # page v5e: 400 GB/s a chip, both ways, 4 links
                ring=16,
                dcn=25e9 / 8,  # page v5e: 6.4 Tb/s a pod of 256
                small_slices=_SQUARES,
                most_chips=256,
            ),
            Chip(
                "v5p",
                devices=1,
                chip_config="",
                chips_a_host=4,
                # Not published: 2 cores of 4 MXU of 128 x 128.
                clock=1.75e9,
                clock_range=(1.75e9, 1.87e9),
                # Page v5p; int8 from jax-ml.github.io/scaling-book.
                peaks=_peaks(bf16=459e12, s8=918e12),
                bandwidth=2765e9,  # page v5p
                hbm=int(95.73 * _GIB),  # libtpu
                axes=3,
                link=100e9,  # page v5p: 1,200 GB/s a chip, both ways, 6 links
                ring=4,
                dcn=50e9 / 8,  # page v5p: 50 Gb/s a chip
                small_slices=_BELOW_A_CUBE,
                most_chips=6144,  # page v5p
            ),
            Chip(
                "v6e",
                devices=1,
                chip_config="",
                chips_a_host=4,  # of a slice of several hosts (ct6e-standard-4t)
                # Not published: 4 MXU of 256 x 256 (the page says 2 today, 4 before: the peak
                # needs 2 x 3.5 GHz or 4 x 1.75).
                clock=1.75e9,
                clock_range=(1.75e9, 1.89e9),
                peaks=_peaks(bf16=918e12, s8=1836e12),  # page v6e
                bandwidth=1638e9,  # page tpu7x; page v6e: 1,600 or 1,640
                hbm=int(31.24 * _GIB),  # libtpu
                axes=2,
                link=100e9,  # page tpu7x: 800 GB/s a chip, both ways, 4 links
                ring=16,
                dcn=100e9 / 8,  # page tpu7x: 100 Gb/s a chip
                small_slices=_SQUARES,
                most_chips=256,
            ),
            Chip(
                "tpu7x",
                devices=2,
                chip_config="",
                chips_a_host=4,
                # Not published: 4 MXU of 256 x 256 a core.
                clock=2.2e9,
                clock_range=(2.2e9, 2.46e9),
                # Page tpu7x, a chip: bf16 2,307, fp8 4,614. No int8 rate is published, and libtpu
                # schedules int8 more slowly than bfloat16.
                peaks=_peaks(
                    bf16=2307e12 / 2, s8=2307e12 / 2, f8e4m3fn=4614e12 / 2, f8e5m2=4614e12 / 2
                ),
                bandwidth=7380e9 / 2,  # page tpu7x, a chip: 7,380 GB/s
                hbm=int(94.74 * _GIB),  # libtpu
                axes=3,
                link=100e9,  # page tpu7x: 1,200 GB/s a chip, both ways, 6 links
                ring=4,
                dcn=100e9 / 8,  # page tpu7x: 100 Gb/s a chip
                small_slices=_BELOW_A_CUBE,
                most_chips=9216,  # page tpu7x: a pod
            ),
        )
    }
)


def chip_of(topology: str) -> Chip:
    """The chip of a topology like "v5e:16x16".

    Raises: ValueError for an unknown chip, a text of another form, or a slice that does not exist.
    """
    name, _, dimensions = topology.partition(":")
    lengths = dimensions.split("x")
    if name not in CHIPS or not all(length.isdecimal() for length in lengths):
        raise ValueError(
            f"the topology must be of {', '.join(CHIPS)}, like v5e:2x2 or v5p:2x2x1, not "
            f"{topology!r}"
        )
    chip = CHIPS[name]
    if not chip.has_slice(tuple(map(int, lengths))):
        shapes = ", ".join("x".join(map(str, shape)) for shape in chip.small_slices)
        larger = (
            f", and AxBxC of multiples of 4 with A <= B <= C and at most {chip.most_chips:,} chips"
            if chip.axes == 3
            else ""
        )
        raise ValueError(f"there is no slice {topology!r}: {name} has {shapes}{larger}")
    return chip
