"""Length of the TPU compiler's own schedule of an instruction, from its dump.

The compiler lowers every HLO instruction to *bundles*, instruction words of which the core issues
one a cycle unless it waits. Their dump marks the bodies of loops and names the tests that end them,
and where branches go, so the bundles can be counted as often as they are issued. (libtpu's own
count, --xla_jf_dump_static_llo_profile_to, is 2 to 3 % higher; that flag crashes for some int8
programs.)
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bipft_jax.pods.counters import Counters

# "  0x7 LB: > > { ...": a label where control arrives (LB: body of a loop), a ">" for each loop
# around. The compiler omits the ">" of empty bundles.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(?:([A-Z]{2})\s*)?:\s*((?:>\s*)*)\{(\s*\})?")
# The test that ends a loop is labelled, or is what the branch back to its body reads.
_LABELLED = re.compile(
    r"scmp\.(ge)\.s32\.totalorder %(\S+?), (\d+) /\* (?:[^*]*:: )?loop exit test"
)
_BRANCH = re.compile(r"sbr\.rel \(!%(\w+)\) target")
_BRANCH_DELAY = 4  # bundles that are issued after a branch
# A branch over a region, and where control then arrives.
_FORWARD = re.compile(r"sbr\.rel \((!?)%(\w+)\) target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_FILE = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt")

_Row = tuple[str | None, int, str]  # label, number of loops around, text of a bundle


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one HLO instruction.

    bundles: instruction words. cycles: those issued, if the core never waits. unknown_loops: loops
    whose trip count cannot be read; their bodies are counted once.
    """

    bundles: int
    cycles: float
    unknown_loops: int


def read(paths: Iterable[Path]) -> dict[str, Schedule]:
    """The schedule of every instruction by its name, from the files of final bundles of one
    program."""
    named = ((_FILE.fullmatch(path.name), path) for path in paths)
    return {
        name[1]: schedule(path.read_text(encoding="utf-8", errors="replace"))
        for name, path in named
        if name
    }


def schedule(text: str) -> Schedule:
    """Counts the bundles of one instruction, in loops as often as these run. Bundles that the
    branches of an outermost loop skip are not counted, where the branches can be followed."""
    rows = list(_rows(text))
    regions: dict[str, int] = {}
    for place, (_, _, line) in enumerate(rows):
        for number in _REGION.findall(line):
            regions.setdefault(number, place)
    weights = [1.0] * len(rows)
    unknown = 0
    for begin, end in _loops(rows):
        rounds = _rounds(rows, begin, end)
        unknown += rounds is None
        if rows[begin][1] == 1 and rounds:
            times = _issued(rows, begin, end, rounds, regions)
        else:
            times = [rounds or 1] * (end - begin)
        for place, count in enumerate(times, begin):
            weights[place] *= count
    return Schedule(len(rows), sum(weights), unknown)


def _issued(
    rows: list[_Row], begin: int, end: int, rounds: int, regions: dict[str, int]
) -> list[int]:
    """How often each bundle of an outermost loop's body is issued."""
    branches = []
    for place in range(begin, end):
        for negated, name, number in _FORWARD.findall(rows[place][2]):
            target = regions.get(number, 0)
            after = place + 1 + _BRANCH_DELAY
            if rows[place][1] == 1 and after < target <= end:
                branches.append((place, name, bool(negated), after, target))
    counters = Counters([line for _, _, line in rows], begin, end + 1 + _BRANCH_DELAY)
    changes = [0] * (end - begin + 1)
    for turn in range(rounds):
        at = begin
        for place, name, negated, after, target in branches:
            condition = counters.value(name, turn)
            if place < at or condition is None or bool(condition) == negated:
                continue
            changes[at - begin] += 1
            changes[after - begin] -= 1
            at = target
        changes[at - begin] += 1
        changes[end - begin] -= 1
    return list(itertools.accumulate(changes))[:-1]


def _rounds(rows: list[_Row], begin: int, end: int) -> int | None:
    """Trip count of a loop whose counter starts at 0 and is compared with a constant."""
    depth = rows[begin][1]
    body = [line for _, at, line in rows[begin:end] if at == depth]
    test = next((test for line in body if (test := _LABELLED.search(line))), None)
    if test is None:
        for _, _, line in rows[end - 1 : end + _BRANCH_DELAY]:
            for name in _BRANCH.findall(line):
                read = re.compile(rf"%{name} = scmp\.(ge|gt)\.s32\.totalorder %(\w+), (\d+)")
                test = test or next((test for line in body if (test := read.search(line))), None)
    if test is None:
        return None
    step = re.compile(rf"%{test[2]} = sadd\.s32 (\d+),")
    steps = int(next((match[1] for line in body if (match := step.search(line))), 1))
    last = int(test[3])
    return last // steps + 1 if test[1] == "gt" else -(-last // steps)


def _rows(text: str) -> Iterator[_Row]:
    depth = 0
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            label, loops, empty = bundle.groups()
            depth = depth if empty else loops.count(">")
            yield label, depth, line


def _loops(rows: list[_Row]) -> list[tuple[int, int]]:
    """First bundle of each loop's body, and the one after its last."""
    loops, opened = [], []
    for place, (label, depth, _) in enumerate(rows):
        while opened and (
            depth < rows[opened[-1]][1] or (label == "LB" and depth == rows[opened[-1]][1])
        ):
            loops.append((opened.pop(), place))
        if label == "LB":
            opened.append(place)
    return loops + [(begin, len(rows)) for begin in reversed(opened)]
