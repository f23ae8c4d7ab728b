"""pgvae doctor: on real servers, and its judgement of reports that no machine here gives."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import as_role, drop_database
from pgvae import __version__, doctor, resources
from pgvae.doctor import Check, Facts, diagnose
from pgvae.errors import PgvaeError
from pgvae.install import install
from pgvae.server import Server
from variants import install_variant

RunCli = Callable[..., subprocess.CompletedProcess[str]]

FACTS = Facts(
    version=15,
    minor=9,
    version_text="PostgreSQL 15.9 (Debian 15.9-1) on x86_64-pc-linux-gnu",
    database="shop",
    role="postgres",
    superuser=True,
    may_create=True,
    standby=False,
    plpython_available=True,
    plpython_installed=True,
    pgvae_installed=True,
    cron_available=False,
    cron_preloaded=False,
    cron_installed=False,
)
RED_HAT = replace(
    FACTS, version_text="PostgreSQL 16.4 on x86_64-pc-linux-gnu, compiled by gcc (GCC) 11.4 (Red Hat 11.4)"
)

REPORT: dict[str, Any] = {
    "python": "3.11.2",
    "prefix": "/usr",
    "libpython": [],
    "gpu_driver": False,
    "disk_free": 10**11,
    "numpy": {"version": "1.24.2", "file": "/x"},
    "blas": {"libraries": ["/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"], "gflops": 100.0},
    "cupy": {"absent": "No module named 'cupy'"},
}


def findings(dsn: str) -> dict[str, Check]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return {check.name: check for check in diagnose(connection)}


def test_a_good_server(empty_database: str) -> None:
    found = findings(empty_database)
    assert list(found) == [
        "server", "privileges", "plpython3u", "python", "numpy", "blas", "gpu", "disk", "pg_cron", "pgvae",
    ]  # fmt: skip
    assert not doctor.failed(list(found.values()))
    for name in ("server", "privileges", "plpython3u", "python", "numpy"):
        assert found[name].status == "ok", found[name]
    assert "libpython3" in found["python"].found
    assert "GFLOP/s" in found["blas"].found
    assert found["pgvae"].remedy == "pgvae install"


def test_a_session_that_reads_backslashes_as_escapes(empty_database: str) -> None:
    warnings: list[Any] = []
    with psycopg.connect(empty_database, options="-c standard_conforming_strings=off") as connection:
        connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
        doctor.read_facts(connection)
    assert warnings == []


def test_it_leaves_nothing_behind(empty_database: str) -> None:
    findings(empty_database)
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("select from pg_language where lanname = 'plpython3u'").rowcount == 0


def test_an_installed_database(database: str) -> None:
    found = findings(database)
    assert found["plpython3u"].found == "installed in this database"
    assert found["pgvae"] == Check(
        name="pgvae",
        status="ok",
        found=f"pgvae {__version__}, installed in database {conninfo_to_dict(database)['dbname']}",
    )


def test_a_database_with_the_code_of_another_release(database: str, run_cli: RunCli, role: str) -> None:
    other = install_variant(database, "limits", ("_DEFAULT = 600 << 20", "_DEFAULT = 601 << 20"))
    check = findings(database)["pgvae"]
    assert check.status == "warn"
    for digest in (other, resources.runtime_digest()):
        assert f"({digest[:12]})" in check.found
    assert str(check.remedy).startswith("pgvae install ")
    done = run_cli("doctor", dsn=database)
    assert done.returncode == 0
    assert "pgvae → pgvae install upgrades the database" in done.stdout
    # Who may not read it is not told.
    assert findings(as_role(database, role))["pgvae"].status == "ok"
    install(database)
    assert findings(database)["pgvae"].status == "ok"


def test_an_unprivileged_role(empty_database: str, role: str) -> None:
    found = findings(as_role(empty_database, role))
    assert found["privileges"].status == "fail"
    assert role in found["privileges"].found
    assert found["python"].status == "warn"
    assert "not checked" in found["python"].found
    assert "numpy" not in found


def test_an_unprivileged_role_where_pgvae_is_installed(database: str, role: str) -> None:
    found = findings(as_role(database, role))
    assert found["privileges"].status == "warn"
    assert not doctor.failed(list(found.values()))


def test_a_server_without_plpython(server_without_plpython: Server) -> None:
    found = findings(server_without_plpython.dsn())
    version = found["server"].found.split()[1].split(".")[0]
    assert found["plpython3u"].status == "fail"
    assert str(found["plpython3u"].remedy).split("; ") == [
        f"on the server: sudo apt install postgresql-plpython3-{version}",
        "where that is forbidden: pgvae install --external, and pgvae refresh scores outside",
    ]
    assert found["python"].found == "not checked: it needs plpython3u"


def test_numpy_that_does_not_import(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create extension plpython3u")
        # The interpreter lives as long as the session: from here on it has no numpy.
        connection.execute("do $$ import sys; sys.modules['numpy'] = None $$ language plpython3u")
        found = {check.name: check for check in diagnose(connection)}
    assert found["numpy"].status == "fail"
    assert found["numpy"].remedy
    assert "sudo apt install python3-numpy" in found["numpy"].remedy
    assert "blas" not in found


def test_a_python_and_a_numpy_that_are_too_old() -> None:
    python = doctor.check_python({**REPORT, "python": "3.9.2"})
    assert python.status == "fail"
    assert "3.9.2" in python.found
    assert python.found.endswith("pgvae needs 3.10")
    numpy = doctor.check_numpy({**REPORT, "numpy": {"version": "1.19.5", "file": "/x"}}, FACTS)
    assert (numpy.status, numpy.found) == ("fail", "numpy 1.19.5 (/x); pgvae needs 1.21")
    assert "python3.11 -m pip install --break-system-packages 'numpy>=1.21'" in str(numpy.remedy)
    assert doctor.check_python({**REPORT, "python": "3.14.10"}).status == "ok"


def test_no_installation_where_a_required_piece_is_missing(
    empty_database: str, server_without_plpython: Server, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(dsn: str) -> PgvaeError:
        with pytest.raises(PgvaeError) as raised:
            install(dsn)
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select to_regnamespace('vae')").fetchone() == (None,)
        return raised.value

    assert refused(as_role(empty_database, role)).message == f"role {role} is not a superuser"
    without = refused(server_without_plpython.dsn())
    assert without.message == "plpython3u: not available on the server"
    assert "sudo apt install postgresql-plpython3" in str(without.hint)
    monkeypatch.setattr(doctor, "OLDEST_NUMPY", (99, 0))
    old = refused(empty_database)
    assert old.message.endswith("pgvae needs 99.0")
    assert "numpy>=99.0" in str(old.hint)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_of_another_encoding(server: Server, run_cli: RunCli, encoding: str) -> None:
    name = f"encoding_{encoding.lower()}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"create database {name} encoding '{encoding}' locale 'C' template template0")
    try:
        for command in ("doctor", "install"):
            done = run_cli(command, dsn=server.dsn(name))
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert f"has the encoding {encoding}" in done.stdout + done.stderr
            assert "encoding 'UTF8'" in done.stdout + done.stderr
    finally:
        drop_database(server, name)


def test_python_that_does_not_start(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create extension plpython3u")
        connection.execute("do $$ import sys; sys.modules['json'] = None $$ language plpython3u")
        found = {check.name: check for check in diagnose(connection)}
        assert found["python"].status == "fail"
        assert "json" in found["python"].found
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_gpu_that_cupy_sees(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create extension plpython3u")
        connection.execute(
            """
            do language plpython3u $$
            import sys, types
            cupy = types.ModuleType("cupy")
            cupy.__version__ = "13.3"
            runtime = types.SimpleNamespace(
                getDeviceCount=lambda: 1, getDeviceProperties=lambda number: {"name": b"Tesla"})
            nvrtc = types.SimpleNamespace(getVersion=lambda: (12, 4))
            cupy.cuda = types.SimpleNamespace(runtime=runtime, nvrtc=nvrtc, cublas=types.SimpleNamespace(create=None))
            sys.modules["cupy"] = cupy
            $$
            """
        )
        found = {check.name: check for check in diagnose(connection)}
        assert found["gpu"] == Check(name="gpu", status="ok", found="cupy 13.3, Tesla")
        # CuPy without [ctk]: its module of cuBLAS is loaded when it is first used.
        connection.execute(
            """
            do language plpython3u $$
            import sys
            class Cuda:
                runtime, nvrtc = sys.modules["cupy"].cuda.runtime, sys.modules["cupy"].cuda.nvrtc
                def __getattr__(self, name):
                    raise ImportError("libcublas.so.12: cannot open shared object file")
            sys.modules["cupy"].cuda = Cuda()
            $$
            """
        )
        found = {check.name: check for check in diagnose(connection)}
    assert found["gpu"].status == "warn"
    assert found["gpu"].found == (
        "cupy 13.3 lacks CUDA's libraries, the CPU scores: libcublas.so.12: cannot open shared object file"
    )
    assert "'cupy-cuda12x[ctk]'" in str(found["gpu"].remedy)


@pytest.mark.parametrize(
    ("version", "minor", "status"),
    [
        (12, 22, "fail"),
        (13, 14, "ok"),
        (13, 13, "warn"),
        (14, 10, "warn"),
        (15, 5, "warn"),
        (15, 6, "ok"),
        (16, 0, "ok"),
        (18, 0, "ok"),
        (19, 0, "warn"),
    ],
)
def test_versions(version: int, minor: int, status: str) -> None:
    assert doctor.check_version(replace(FACTS, version=version, minor=minor)).status == status


def test_a_server_on_which_an_owner_becomes_superuser() -> None:
    found = doctor.check_version(replace(FACTS, minor=5))
    assert "CVE-2024-0985" in found.found
    assert found.remedy == "upgrade the server to PostgreSQL 15.6 or newer"


def test_a_standby() -> None:
    assert doctor.check_privileges(replace(FACTS, standby=True)).status == "info"


def test_packages_of_red_hat() -> None:
    assert (
        doctor.package_command(replace(RED_HAT, version=16), "plpython3") == "sudo dnf install postgresql16-plpython3"
    )


@pytest.mark.parametrize(
    ("libraries", "gflops", "status"),
    [
        (["/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.10.0"], 2.5, "warn"),
        (["/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"], 2.5, "ok"),
        (["/opt/intel/libmkl_rt.so.2"], 90, "ok"),
        ([], 2.5, "warn"),
        ([], 90, "ok"),
    ],
)
def test_blas(libraries: list[str], gflops: float, status: str) -> None:
    check = doctor.check_blas({**REPORT, "blas": {"libraries": libraries, "gflops": gflops}}, FACTS)
    assert check is not None
    assert check.status == status
    assert (check.remedy is None) == (status == "ok")


def test_a_blas_that_does_not_know_the_processor() -> None:
    libraries = ["/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"]
    check = doctor.check_blas({**REPORT, "blas": {"libraries": libraries, "gflops": 7.6, "is_outdated": True}}, FACTS)
    assert check is not None
    assert (check.status, "older than this processor" in check.found) == ("info", True)
    assert "OPENBLAS_CORETYPE=Haswell" in str(check.remedy)


@pytest.mark.parametrize(
    ("cupy", "driver", "status"),
    [
        ({"absent": "No module named 'cupy'"}, False, "info"),
        ({"absent": "No module named 'cupy'"}, True, "warn"),
        ({"version": "13.3", "error": "CUDARuntimeError: no driver"}, True, "warn"),
        ({"version": "13.3", "devices": []}, False, "info"),
    ],
)
def test_gpu(cupy: dict[str, Any], driver: bool, status: str) -> None:
    assert doctor.check_gpu({**REPORT, "cupy": cupy, "gpu_driver": driver}).status == status


def test_a_full_disk() -> None:
    check = doctor.check_disk({**REPORT, "disk_free": 10**8})
    assert check is not None
    assert check.status == "warn"


def test_pg_cron() -> None:
    absent = doctor.check_cron(FACTS)
    assert absent.remedy == "on the server: sudo apt install postgresql-15-cron"
    available = doctor.check_cron(replace(FACTS, cron_available=True))
    assert "shared_preload_libraries" in str(available.remedy)
    preloaded = doctor.check_cron(replace(FACTS, cron_available=True, cron_preloaded=True))
    assert "create extension pg_cron" in str(preloaded.remedy)
    assert doctor.check_cron(replace(FACTS, cron_installed=True)).status == "ok"


def test_the_command(run_cli: RunCli, empty_database: str, role: str) -> None:
    done = run_cli("doctor", dsn=empty_database)
    assert done.returncode == 0, done.stderr
    assert "plpython3u" in done.stdout
    assert "pgvae → pgvae install" in done.stdout
    done = run_cli("doctor", "--json", dsn=as_role(empty_database, role))
    assert done.returncode == 1
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["privileges"]["status"] == "fail"
    assert found["privileges"]["remedy"]
