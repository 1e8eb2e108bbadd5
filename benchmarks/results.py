"""What a benchmark leaves behind: a table on the screen and JSON under ``results/<device>/``."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jaxlib
import numpy as np

from benchmarks.harness import Figures, Row, Table

ROOT = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    """The machine and the versions that a result was measured with."""
    device = jax.devices()[0]
    return {
        "device": device_name(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
    }


def device_name() -> str:
    """Folder name for results of this machine: the accelerator's kind, or the processor's model and cores."""
    device = jax.devices()[0]
    name = f"{cpu_model()} {cpu_cores()} cores" if device.platform == "cpu" else device.device_kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's own name for itself, or its architecture where the system keeps no name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        return found[1].strip() if found else platform.machine()
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def markdown(table: Table) -> str:
    """The table in markdown, aligned for reading on a terminal; columns without a figure are left out."""
    columns = {
        table.title: [row.name for row in table.rows],
        "median": [duration(row.median) for row in table.rows],
        "IQR": [duration(row.interquartile_range) for row in table.rows],
        f"x {table.baseline}": [_optional(row.ratio, "{:.2f}") for row in table.rows],
        "of limit": [_optional(row.limit_fraction, "{:.0%}") for row in table.rows],
        f"{table.unit}/s": [_optional(row.items_per_second, "{:,.0f}") for row in table.rows],
    }
    return _aligned({head: cells for head, cells in columns.items() if any(cells)})


def markdown_of_figures(figures: Figures) -> str:
    """The figures in markdown under their title: whole numbers as they are, others with one decimal."""
    columns = {head: [_figure(row[head]) for row in figures.rows] for head in figures.rows[0]}
    return f"{figures.title}\n\n{_aligned(columns)}"


def _figure(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _aligned(kept: Mapping[str, Sequence[str]]) -> str:
    widths = [max(map(len, [head, *cells])) for head, cells in kept.items()]
    lines = [list(kept), ["-" * width for width in widths], *map(list, zip(*kept.values(), strict=True))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def duration(seconds: float) -> str:
    """A time in the unit that leaves it readable: ``1.50 s``, ``12.3 ms`` or ``45.6 us``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def save(
    name: str,
    tables: Sequence[Table],
    *,
    figures: Sequence[Figures] = (),
    rates: Mapping[str, float] | None = None,
    root: Path | None = None,
) -> Path:
    """Writes ``<device>/<name>.json``, whole or not at all, and returns its path.

    It goes under ``root``, which is ``results`` beside this file unless given. Times are in
    seconds. ``rates`` are the machine's measured limits, keyed by what and unit: ``"copy B/s"``.
    """
    description = machine()
    path = (root or ROOT) / str(description["device"]) / f"{name}.json"
    content = {
        "name": name,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": description,
        "rates": dict(rates or {}),
        "tables": [_table_json(table) for table in tables],
        "figures": [{"title": group.title, "rows": [dict(row) for row in group.rows]} for group in figures],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    return path


def _table_json(table: Table) -> dict[str, object]:
    rows = [_row_json(row) for row in table.rows]
    return {"title": table.title, "baseline": table.baseline, "unit": table.unit, "rows": rows}


def _row_json(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "median": row.median,
        "interquartile_range": row.interquartile_range,
        "ratio": row.ratio,
        "limit_fraction": row.limit_fraction,
        "items_per_second": row.items_per_second,
        "seconds": list(row.seconds),
    }


def publish(
    name: str,
    tables: Sequence[Table],
    *,
    figures: Sequence[Figures] = (),
    rates: Mapping[str, float] | None = None,
    root: Path | None = None,
) -> Path:
    """Prints the machine, its measured rates, every table and other figures, saves the JSON, and returns its path."""
    description = machine()
    versions = ", ".join(f"{key} {description[key]}" for key in ("python", "jax"))
    print(f"{description['device_kind']}: {description['cpu']}, {description['cores']} cores, {versions}")
    for rate, value in (rates or {}).items():
        what, unit = rate.rsplit(" ", 1)
        print(f"{what}: {value / 1e9:,.1f} G{unit}")
    for table in tables:
        print(f"\n{markdown(table)}")
    for group in figures:
        print(f"\n{markdown_of_figures(group)}")
    path = save(name, tables, figures=figures, rates=rates, root=root)
    print(f"\nwritten: {path}")
    return path
