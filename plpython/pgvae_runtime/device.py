"""Which array module computes: NumPy, or CuPy where a GPU pays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import INVALID_PARAMETER, ScoringError

SETTINGS = ("auto", "cpu", "cuda")
# A live call is 10 to 100 MFLOP and done before a transfer to a GPU would be; a refresh is far above this.
GPU_PAYS_FROM_FLOPS = 1e11


def choose(plpy: Any, flops: float) -> Any:
    """Gives numpy or cupy by the setting vae.device (auto, cpu, cuda) and the size of the work in FLOPs.

    Without a usable GPU it gives numpy: silently under auto, with a NOTICE under cuda.
    """
    setting = plpy.execute("select pg_catalog.current_setting('vae.device', true) as device")[0]["device"] or "auto"
    if setting not in SETTINGS:
        raise ScoringError(
            f"vae.device is {setting!r}", sqlstate=INVALID_PARAMETER, hint=f"set it to one of {', '.join(SETTINGS)}"
        )
    if setting == "cpu" or (setting == "auto" and flops < GPU_PAYS_FROM_FLOPS):
        return np
    try:
        import cupy

        if not cupy.cuda.runtime.getDeviceCount():
            raise RuntimeError("no device")
    # Whatever keeps CuPy from working (not installed, no driver, no device) must not keep the query from an answer.
    except Exception as error:
        if setting == "cuda":
            plpy.notice(f"vae.device is cuda, but no GPU is usable ({error}); the CPU scores")
        return np
    return cupy


def to_host(xp: Any, array: Any) -> Any:
    """Gives the array as a NumPy array."""
    return array if xp is np else xp.asnumpy(array)


def to_device(xp: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Gives the weights as arrays of `xp`."""
    return weights if xp is np else {name: xp.asarray(array) for name, array in weights.items()}
