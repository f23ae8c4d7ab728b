"""Compiles the scorer's CUDA source for the CPU, so that its logic is tested where there is no GPU: cuda_on_cpu.h."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pgvae_runtime import cuda_kernels

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the CUDA kernels for the CPU with")


def digest(source: str, options: Sequence[str]) -> str:
    """Gives what tells a source and its options from others, as fake_cupy does."""
    return hashlib.sha256(repr((source, options)).encode()).hexdigest()


def digest_and_library(build: Callable[..., str], width: int) -> tuple[str, str]:
    """Gives the digest of the kernels for a latent space of that width, and their library."""
    options = cuda_kernels.options(width)
    return digest(cuda_kernels.SOURCE, options), build(cuda_kernels.SOURCE, options)


def build(source: str, options: Sequence[str], folder: Path) -> str:
    """Gives the path of a library of the source: a function launch_NAME for each kernel."""
    library = folder / f"kernels-{digest(source, options)[:16]}.so"
    if not library.exists():
        text = '#include "cuda_on_cpu.h"\n' + source + "\n".join(f"EMULATED({name})" for name in cuda_kernels.KERNELS)
        definitions = [option for option in options if option.startswith("-D")]
        command = [COMPILER, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        # g++ takes `#pragma unroll` for a word that it does not know.
        flags = ["-Wno-unknown-pragmas", "-I", str(Path(__file__).parent), "-o", str(library), "-"]
        done = subprocess.run([*command, *definitions, *flags], input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    return str(library)
