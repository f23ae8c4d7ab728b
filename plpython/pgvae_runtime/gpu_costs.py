"""Whether a GPU pays: how long scoring all users takes on the CPU and on the GPU, by constants of the machine.

`make gpu` measures them where there is a GPU, and prints the statement that sets them: vae.gpu_costs. The
defaults are guesses, to the GPU's disadvantage: a slow GPU beside a fast CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import INVALID_PARAMETER, ScoringError


@dataclass(frozen=True, kw_only=True)
class Work:
    """A scoring of all users: how many, of how many items in how many dimensions, with how many bytes of weights."""

    users: int
    items: int
    width: int
    weight_bytes: int

    @staticmethod
    def of(users: int, weights: Mapping[str, Any]) -> Work:
        """Gives the work of scoring so many users with these weights."""
        items, width = weights["output_weight"].shape
        return Work(
            users=users, items=items, width=width, weight_bytes=sum(tensor.nbytes for tensor in weights.values())
        )


# More than any start takes.
ENDLESS = Work(users=10**12, items=10**6, width=256, weight_bytes=0)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Constants of a machine. A logit is one item's score for one user; its seconds are those beside the product."""

    gpu_start_seconds: float = 5.0
    gpu_bytes_per_second: float = 2e9
    gpu_flops: float = 3e12
    gpu_seconds_per_logit: float = 2e-10
    cpu_flops: float = 4e11
    cpu_seconds_per_logit: float = 1e-9

    def seconds_on_cpu(self, work: Work) -> float:
        """Gives an estimate of the seconds that the CPU takes, without reading and writing."""
        return work.users * work.items * (2 * work.width / self.cpu_flops + self.cpu_seconds_per_logit)

    def seconds_on_gpu(self, work: Work) -> float:
        """Gives an estimate of the seconds that the GPU takes, from nothing: context, kernels, weights."""
        scoring = work.users * work.items * (2 * work.width / self.gpu_flops + self.gpu_seconds_per_logit)
        return self.gpu_start_seconds + work.weight_bytes / self.gpu_bytes_per_second + scoring

    @staticmethod
    def from_setting(text: str | None) -> Costs:
        """Gives the constants of the setting vae.gpu_costs, an object of JSON; the defaults for what it leaves out."""
        if not text:
            return Costs()
        names = [field.name for field in fields(Costs)]
        try:
            given: Any = json.loads(text)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise _refused(text, f"an object with some of {', '.join(names)}")
        for name, value in given.items():
            if name not in names:
                raise _refused(name, f"known names: {', '.join(names)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise _refused(f"{name}: {value}", "a number above 0")
        return Costs(**given)


def _refused(what: str, wanted: str) -> ScoringError:
    return ScoringError(
        f"vae.gpu_costs holds {what!r}",
        sqlstate=INVALID_PARAMETER,
        hint=f"give {wanted}; `make gpu` measures them, `reset vae.gpu_costs` brings the defaults back",
    )
