"""A benchmark's figures as a table and as a file of benchmarks/results."""

from __future__ import annotations

import json
import os
import platform
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pgvae.console import out

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value; a ratio is against the peer that was measured in the same run."""

    figure: str
    value: float
    unit: str
    target: float | None = None
    peer: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value is at or below its target."""
        return None if self.target is None else self.value <= self.target


def report(name: str, figures: list[Figure], facts: dict[str, object]) -> None:
    """Prints the figures, the ratios first, and writes them with the facts of the machine."""
    ordered = sorted(figures, key=lambda figure: figure.unit != "ratio")
    table = Table(box=SIMPLE_HEAD, title=name, title_justify="left")
    for header in ("figure", "value", "unit", "target", "met", "against"):
        table.add_column(header, justify="right" if header in ("value", "target") else "left")
    for figure in ordered:
        met = {True: "yes", False: "no", None: ""}[figure.met]
        target = "" if figure.target is None else f"{figure.target:g}"
        table.add_row(figure.figure, f"{figure.value:.3g}", figure.unit, target, met, figure.peer or "")
    out.print(table)
    RESULTS.mkdir(exist_ok=True)
    rows = [{**asdict(figure), "met": figure.met} for figure in ordered]
    content = {"name": name, "machine": machine(), "facts": facts, "figures": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """Gives the facts of this machine."""
    return {"cores": os.cpu_count(), "processor": _processor(), "system": platform.platform(terse=True)}


def peak_mb() -> float:
    """Gives the most memory that this process had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
