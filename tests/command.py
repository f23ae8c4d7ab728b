"""`pgvae ARGS…` without seconds of imports each time: in forks of a process that has imported all once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

import pytest

# A wide terminal, so that no message is wrapped; no colours.
TERMINAL = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["preload"])


def start_server() -> None:
    """Starts the process that all others are forks of, unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        # The consoles of pgvae.console ask about the terminal when they are imported.
        for name, value in {**TERMINAL, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def run(arguments: tuple[str, ...], environment: Mapping[str, str], input: str) -> subprocess.CompletedProcess[str]:
    """Runs the command and gives its exit status and what it printed."""
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(input, encoding="utf-8")
        process = processes.Process(target=_main, args=(arguments, dict(environment), streams))
        process.start()
        try:
            process.join(600)
            assert process.exitcode is not None, f"{arguments} has not ended"
        finally:
            process.kill()
        stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams[1:])
        return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _main(arguments: tuple[str, ...], environment: dict[str, str], streams: list[Path]) -> None:
    from pgvae.cli import main

    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["pgvae", *arguments]
    main()
