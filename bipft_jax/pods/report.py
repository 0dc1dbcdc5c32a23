"""An inspection as text, and as JSON."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

from bipft_jax.pods import network
from bipft_jax.pods.inspection import Inspection
from bipft_jax.pods.scaling import Rung
from bipft_jax.pods.timeline import Timed
from bipft_jax.reports.tables import aligned

_GIB = 2**30
_COSTLIEST = 8  # parts


def text(inspection: Inspection, usd_per_chip_hour: float | None = None) -> str:
    """The report, without the reasons for a failure."""
    parts = [_heading(inspection), _programs(inspection)]
    if inspection.step is not None:
        parts += [_collectives(inspection), _costliest(inspection), _step(inspection)]
        if usd_per_chip_hour is not None:
            parts.append(
                f"USD per 10^9 tokens at {usd_per_chip_hour:.2f} a chip and hour: "
                f"{usd_per_billion(inspection, usd_per_chip_hour):.2f}"
            )
    if inspection.curve:
        parts.append(_curve(inspection))
    if inspection.fit is not None and inspection.fit.remat is not None:
        fit = inspection.fit
        parts.append(
            f"fits: remat {fit.remat} is the cheapest, and with it {fit.rows} sequences on a "
            f"device ({fit.bytes / _GIB:.2f} GiB)"
        )
    return "\n\n".join(parts)


def record(inspection: Inspection, usd_per_chip_hour: float | None = None) -> dict[str, Any]:
    """The same as JSON values: seconds, bytes, cycles; times of the network are modelled."""
    setting, step, input_ = inspection.setting, inspection.step, inspection.input
    record = {
        "topology": setting.topology,
        "slices": setting.slices,
        "mesh": dict(setting.mesh.shape),
        "chips": setting.chips,
        "hosts": len(set(setting.layout.hosts.tolist())),
        "config": setting.config.to_dict(),
        "vocab_size": setting.learner.model.config.vocab_size,
        "length": setting.length,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "hbm": setting.chip.hbm,
        "clock": setting.chip.clock,
        "programs": [
            {
                "name": one.name,
                "compile_seconds": one.seconds,
                "compile_cpu_seconds": one.cpu_seconds,
                "arguments": one.memory.arguments,
                "outputs": one.memory.outputs,
                "temporaries": one.memory.temporaries,
                "code": one.memory.code,
                "beside": one.memory.beside,
                "cycles": one.cost.cycles,
                "estimated_cycles": one.cost.estimated_cycles,
            }
            for one in inspection.programs
        ],
        "reasons": list(inspection.reasons),
    }
    if step is not None:
        record |= {
            "cycles_by_kind": inspection.update.cost.by_kind,
            "cycles_by_module": inspection.update.cost.by_module,
            "cycles_by_source": inspection.update.cost.by_source,
            "collectives": [_timed(inspection, one) for one in step.collectives],
            "step_seconds": step.seconds,
            "compute_seconds": step.compute,
            "exposed_seconds": step.exposed,
            "ici_seconds": step.communication.ici,
            "dcn_seconds": step.communication.dcn,
            "tokens_per_second": inspection.tokens_per_second,
            "mfu": inspection.mfu,
            "host_wants": input_.wanted,
            "process_makes": input_.made,
            "made_from": input_.measured,
        }
        if usd_per_chip_hour is not None:
            record["usd_per_billion_tokens"] = usd_per_billion(inspection, usd_per_chip_hour)
    if inspection.curve:
        record["curve"] = [_rung(rung) for rung in inspection.curve]
    if inspection.fit is not None:
        fit = inspection.fit
        record["fit"] = {"remat": fit.remat, "rows": fit.rows, "bytes": fit.bytes}
    return record


def usd_per_billion(inspection: Inspection, usd_per_chip_hour: float) -> float:
    """Cost of 10^9 tokens."""
    seconds = 1e9 / inspection.tokens_per_second
    return usd_per_chip_hour * inspection.setting.chips * seconds / 3600


def _heading(inspection: Inspection) -> str:
    setting = inspection.setting
    config, mesh, hosts = setting.config, setting.mesh.shape, set(setting.layout.hosts.tolist())
    slices = f"{setting.slices} slices of " if setting.slices > 1 else ""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    return (
        f"{config.recipe} {config.size}, {config.batch_size} sequences of {setting.length} tokens "
        f"an update ({setting.rows} a device), {config.dtype}, remat {config.remat}\n"
        f"{slices}{setting.topology}: {setting.chips} chips, {len(hosts)} hosts, {axes}; jax "
        f"{jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    )


def _programs(inspection: Inspection) -> str:
    hbm = inspection.setting.chip.hbm
    rows = [
        (
            one.name,
            f"{one.seconds:.0f}",
            f"{one.cpu_seconds:.0f}",
            *(
                f"{size / _GIB:.2f}"
                for size in (
                    one.memory.arguments,
                    one.memory.outputs,
                    one.memory.temporaries,
                    one.memory.beside,
                    one.memory.total,
                )
            ),
            f"{one.cost.cycles / 1e6:.2f}",
        )
        for one in inspection.programs
    ]
    header = (
        *("program", "compiled in s", "CPU s", "arguments GiB", "outputs", "temporaries", "beside"),
        *(f"of {hbm / _GIB:.2f}", "M cycles"),
    )
    return aligned([header, *rows], right=range(1, len(header)))


def _collectives(inspection: Inspection) -> str:
    """Those that are alike (kind, array, group, line) share a row."""
    alike: dict[tuple[str, ...], list[Timed]] = {}
    for one in inspection.step.collectives:
        record = _timed(inspection, one)
        names = record["kind"], record["shape"], record["group"], record["network"]
        beside = "" if one.collective.asynchronous else "nothing"
        alike.setdefault((*names, record["source"], beside), []).append(one)
    rows = []
    for (kind, shape, group, over, source, beside), same in alike.items():
        runs = sum(one.count for one in same)
        size = sum(one.count * one.collective.size for one in same)
        seconds = sum(one.count * sum(one.seconds) for one in same)
        computed = sum(one.count * one.beside for one in same)
        beside = beside or f"{1e3 * computed:.3f}"
        cells = (kind, str(runs), f"{size / 1e6:.3f}", shape[:28], group, over)
        rows.append((seconds, (*cells, f"{1e3 * seconds:.3f}", beside, source)))
    if not rows:
        return "the update has no collectives"
    header = (
        *(
            "collectives of the update",
            "runs",
            "MB in all",
            "array",
            "group",
            "network",
            "ms in all",
        ),
        *("beside them ms", "line"),
    )
    note = (
        f"times are modelled: published bandwidths, {1e6 * network.HOP_LATENCY:.0f} us a hop, "
        f"{1e6 * network.LAUNCH_LATENCY:.0f} us to begin, {1e6 * network.DCN_LATENCY:.0f} us "
        "between slices"
    )
    ordered = [cells for _, cells in sorted(rows, reverse=True)]
    return aligned([header, *ordered], right=(1, 2, 6, 7)) + "\n" + note


def _costliest(inspection: Inspection) -> str:
    cost = inspection.update.cost
    rows = [
        (f"{cycles / 1e6:.2f}", f"{cycles / cost.cycles:.0%}", module)
        for module, cycles in list(cost.by_module.items())[:_COSTLIEST]
    ]
    return aligned([("M cycles", "of all", "costliest parts of the update"), *rows], right=(0, 1))


def _step(inspection: Inspection) -> str:
    step, chip = inspection.step, inspection.setting.chip
    input_, (low, high) = inspection.input, chip.clock_range
    rate = inspection.tokens_per_second
    workers = -(-input_.wanted // input_.made)
    return (
        f"step {1e3 * step.seconds:.1f} ms = compute {1e3 * step.compute:.1f} + waiting for the "
        f"network {1e3 * step.exposed:.1f} (ICI {1e3 * step.communication.ici:.1f}, DCN "
        f"{1e3 * step.communication.dcn:.1f}, partly hidden); "
        f"{rate / inspection.setting.length:,.0f} sequences/s, {rate / 1e6:.3f} M tokens/s, "
        f"MFU {inspection.mfu:.0%}\n"
        f"the clock is assumed to be {chip.clock / 1e9:.2f} GHz; {low / 1e9:.2f} to "
        f"{high / 1e9:.2f} fit what is known\n"
        f"each host must make {input_.wanted:,.0f} sequences/s; one process of this machine makes "
        f"{input_.made:,.0f} ({input_.measured}): {workers:.0f} at once (--config.data_workers)"
    )


def _curve(inspection: Inspection) -> str:
    rows = [
        (
            f"{rung.chips:,}",
            f"{rung.slices} x {rung.topology}" if rung.slices > 1 else rung.topology,
            f"{1e3 * rung.weak.seconds:.1f}",
            f"{rung.weak_efficiency:.3f}",
            "" if rung.strong is None else f"{1e3 * rung.strong.seconds:.1f}",
            "" if rung.strong is None else f"{rung.strong_efficiency:.3f}",
        )
        for rung in inspection.curve
    ]
    batch = inspection.setting.config.batch_size // inspection.setting.slices
    header = (
        *("chips", "slices", f"{inspection.setting.rows} sequences a device: ms", "efficiency"),
        *(f"{batch:,} in all: ms", "efficiency"),
    )
    return (
        aligned([header, *rows], right=(0, 2, 3, 4, 5))
        + "\nefficiency: of one device's own program = 1"
    )


def _timed(inspection: Inspection, one: Timed) -> dict[str, Any]:
    setting, collective = inspection.setting, one.collective
    if collective.between_slices:
        group, over = f"{setting.slices} slices", "DCN"
    else:
        place = setting.layout.place(collective.group)
        group, over = str(place), place.network
    return {
        "kind": collective.kind,
        "count": one.count,
        "in_loop": one.in_loop,
        "bytes": collective.size,
        "shape": collective.shape.replace("(", "").partition("{")[0],
        "group": group,
        "members": len(collective.group) or setting.slices,
        "network": over,
        "ici_seconds": one.seconds.ici,
        "dcn_seconds": one.seconds.dcn,
        "asynchronous": collective.asynchronous,
        "beside_seconds": one.beside,
        "hidden_seconds": one.hidden,
        "source": collective.source,
        "operation": collective.operation,
    }


def _rung(rung: Rung) -> dict[str, Any]:
    strong = rung.strong
    return {
        "chips": rung.chips,
        "topology": rung.topology,
        "slices": rung.slices,
        "weak_seconds": rung.weak.seconds,
        "weak_efficiency": rung.weak_efficiency,
        "strong_seconds": None if strong is None else strong.seconds,
        "strong_efficiency": rung.strong_efficiency,
    }
