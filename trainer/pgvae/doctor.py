"""What a server needs for pgvae, what it has, and the command that mends each missing piece.

Every check reads; what has to be tried out happens in a transaction that is rolled back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from pgvae import __version__, resources
from pgvae.errors import PgvaeError
from pgvae.external.mode import is_external

OLDEST, NEWEST = 13, 18
# What the runtime is written for: dataclasses with keywords only, and the types of arrays.
OLDEST_PYTHON, OLDEST_NUMPY = (3, 10), (1, 21)
# Before these a concurrent refresh ran code of the view's owner as whoever refreshes (CVE-2024-0985): of vae.refresh
# that is a superuser. Later versions never did.
SAFE_MINOR = {13: 14, 14: 11, 15: 6}

# A slow machine with a tuned BLAS reaches tens of GFLOP/s, a fast one with the reference BLAS three or four.
SLOW_GFLOPS = 8.0
LOW_DISK_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `fail` is a required piece that is missing; `warn` costs speed or comfort; `info` is optional."""

    name: str
    status: Literal["ok", "info", "warn", "fail"]
    found: str
    remedy: str | None = None


# What to do where PL/Python is out of reach, as on most managed services.
WITHOUT_PYTHON = "where that is forbidden: pgvae install --external, and pgvae refresh scores outside"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the catalogue says about a server and the role that asks."""

    version: int
    minor: int
    version_text: str
    database: str
    role: str
    superuser: bool
    may_create: bool
    standby: bool
    plpython_available: bool
    plpython_installed: bool
    pgvae_installed: bool
    cron_available: bool
    cron_preloaded: bool | None
    cron_installed: bool
    encoding: str = "UTF8"


# Runs inside the server. Each piece is reported by itself, because any import can fail in its own way.
_PROBE = r"""
import ctypes, json, os, shutil, sys, time

def maps():
    try:
        with open("/proc/self/maps") as file:
            return sorted({line.split(None, 5)[5].strip() for line in file if line.count("/")})
    except OSError:
        return []

report = {
    "python": "%d.%d.%d" % sys.version_info[:3],
    "prefix": sys.prefix,
    "libpython": [path for path in maps() if "libpython3" in os.path.basename(path)],
    "gpu_driver": os.path.exists("/proc/driver/nvidia/version"),
}
try:
    report["disk_free"] = shutil.disk_usage(".").free
except OSError:
    pass
try:
    import numpy
    report["numpy"] = {"version": numpy.__version__, "file": numpy.__file__}
except Exception as error:
    report["numpy"] = {"error": "%s: %s" % (type(error).__name__, error)}
else:
    matrix = numpy.ones((512, 512), dtype=numpy.float32)
    matrix @ matrix
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    words = ("blas", "blis", "mkl", "atlas")
    libraries = [path for path in maps() if any(word in os.path.basename(path).lower() for word in words)]
    # What OpenBLAS takes a processor for that is newer than itself.
    is_outdated = False
    for path in libraries:
        try:
            tell = ctypes.CDLL(path).openblas_get_corename
            tell.restype = ctypes.c_char_p
            is_outdated = is_outdated or (tell() == b"Prescott" and " avx2 " in open("/proc/cpuinfo").read())
        except (AttributeError, OSError):
            continue
    report["blas"] = {"libraries": libraries, "gflops": 2 * 512 ** 3 / best / 1e9, "is_outdated": is_outdated}
try:
    # As the runtime imports it: pgvae_runtime/device.py.
    try:
        os.makedirs(os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")), exist_ok=True)
    except OSError:
        os.environ["CUPY_CACHE_DIR"] = os.sep
    import cupy
except ModuleNotFoundError as error:
    report["cupy"] = {"absent": str(error)}
except Exception as error:
    while error.__cause__ is not None:
        error = error.__cause__
    report["cupy"] = {"error": "%s: %s" % (type(error).__name__, error)}
else:
    report["cupy"] = {"version": cupy.__version__}
    try:
        names = []
        for number in range(cupy.cuda.runtime.getDeviceCount()):
            names.append(cupy.cuda.runtime.getDeviceProperties(number)["name"].decode())
    except Exception as error:
        report["cupy"]["error"] = "%s: %s" % (type(error).__name__, error)
    else:
        report["cupy"]["devices"] = names
        try:
            # Loaded when they are first used.
            cupy.cuda.nvrtc.getVersion()
            cupy.cuda.cublas.create
        except Exception as error:
            report["cupy"]["libraries"] = str(error).strip()
plan = plpy.prepare("select pg_catalog.set_config('pgvae.doctor', $1, true)", ["text"])
plpy.execute(plan, [json.dumps(report)])
"""


def diagnose(connection: psycopg.Connection) -> list[Check]:
    """Gives every finding about the server and database of a connection; leaves both as they were."""
    facts = read_facts(connection)
    code = installed_code(connection) if facts.pgvae_installed else None
    ending = [check_cron(facts), check_installation(facts, code)]
    if facts.pgvae_installed and is_external(connection):
        found = "not used: pgvae was installed with --external, and pgvae refresh scores where it runs"
        return [check_version(facts), Check(name="plpython3u", status="info", found=found), *ending]
    checks = [check_version(facts), check_privileges(facts), check_language(facts)]
    if facts.version < OLDEST or not facts.plpython_available:
        checks.append(Check(name="python", status="info", found="not checked: it needs plpython3u"))
    elif not facts.superuser:
        checks.append(
            Check(
                name="python",
                status="warn",
                found=f"not checked: role {facts.role} may not run plpython3u, so numpy and BLAS are unknown",
                remedy="run pgvae doctor with the DSN of a superuser",
            )
        )
    elif facts.standby and not facts.plpython_installed:
        checks.append(Check(name="python", status="info", found="not checked: a standby cannot create plpython3u"))
    else:
        checks += check_inside(connection, facts)
    return [*checks, *ending]


def failed(checks: list[Check]) -> bool:
    """Says whether a required piece is missing."""
    return any(check.status == "fail" for check in checks)


def read_facts(connection: psycopg.Connection) -> Facts:
    """Reads the catalogue; any role may."""
    row = connection.execute(
        """
        select current_setting('server_version_num')::integer / 10000,
               current_setting('server_version_num')::integer % 10000,
               version(),
               current_database(),
               current_user,
               (select rolsuper from pg_catalog.pg_roles where rolname = current_user),
               has_database_privilege(current_database(), 'create'),
               pg_is_in_recovery(),
               exists (select from pg_catalog.pg_available_extensions where name = 'plpython3u'),
               exists (select from pg_catalog.pg_language where lanname = 'plpython3u'),
               exists (
                   -- to_regclass would fail for a role that may not use the schema
                   select
                   from pg_catalog.pg_class as c
                   join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
                   where n.nspname = 'vae' and c.relname = 'models'
               ),
               exists (select from pg_catalog.pg_available_extensions where name = 'pg_cron'),
               (
                   select setting ~ '[[:<:]]pg_cron[[:>:]]'
                   from pg_catalog.pg_settings
                   where name = 'shared_preload_libraries'
               ),
               exists (select from pg_catalog.pg_extension where extname = 'pg_cron'),
               current_setting('server_encoding')
        """
    ).fetchone()
    assert row is not None
    return Facts(**dict(zip(Facts.__dataclass_fields__, row, strict=True)))


def installed_code(connection: psycopg.Connection) -> tuple[str, str] | None:
    """Gives release and digest of the code that the database holds; None where the role may not read them.

    Both are empty where the tables hold no rows, as in a database that was restored without data.
    """
    try:
        with connection.transaction():
            row = connection.execute("select release, runtime_digest from vae_private.installation").fetchone()
            return row or ("", "")
    except psycopg.errors.InsufficientPrivilege:
        return None


def check_code(connection: psycopg.Connection) -> None:
    """Refuses a database that holds other code than this one: what is trained and scored here would not fit."""
    installed = connection.execute("select release, runtime_digest from vae_private.installation").fetchone()
    if installed and installed[1] != resources.runtime_digest():
        raise PgvaeError(
            f"the database holds the code of pgvae {installed[0]} ({installed[1][:12]}), this one is {__version__}"
            f" ({resources.runtime_digest()[:12]})",
            hint="bring both to one release: pgvae install upgrades the database;"
            " where that is newer: pip install pgvae==…",
        )


def inspect_python(connection: psycopg.Connection, facts: Facts) -> dict[str, Any]:
    """Gives what Python inside the server says about itself, its numpy and its GPU; needs a superuser."""
    with connection.transaction(force_rollback=True):
        if not facts.plpython_installed:
            connection.execute("create extension plpython3u")
        connection.execute(f"do language plpython3u $pgvae_doctor${_PROBE}$pgvae_doctor$")
        row = connection.execute("select current_setting('pgvae.doctor')").fetchone()
    assert row is not None
    report = json.loads(row[0])
    assert isinstance(report, dict)
    return report


def check_version(facts: Facts) -> Check:
    """The server is of a version that pgvae is written for."""
    found = f"PostgreSQL {facts.version_text.split()[1]}, database {facts.database}"
    if facts.version < OLDEST:
        remedy = f"upgrade the server to PostgreSQL {OLDEST} or newer"
        return Check(name="server", status="fail", found=found, remedy=remedy)
    if facts.encoding != "UTF8":
        return Check(
            name="server",
            status="fail",
            found=f"{found} has the encoding {facts.encoding}: pgvae's texts, and its code, are in UTF8",
            remedy="pg_dump it, and restore it into a database that was made with: create database … encoding 'UTF8'"
            " template template0",
        )
    if facts.version > NEWEST:
        return Check(name="server", status="warn", found=f"{found}; pgvae is written for {OLDEST} to {NEWEST}")
    if facts.minor < SAFE_MINOR.get(facts.version, 0):
        return Check(
            name="server",
            status="warn",
            found=f"{found}: whoever owns a model can become superuser through vae.refresh (CVE-2024-0985)",
            remedy=f"upgrade the server to PostgreSQL {facts.version}.{SAFE_MINOR[facts.version]} or newer",
        )
    return Check(name="server", status="ok", found=found)


def check_privileges(facts: Facts) -> Check:
    """Installing needs a superuser, because plpython3u is an untrusted language; scoring does not."""
    if facts.standby:
        return Check(name="privileges", status="info", found="a standby is read-only: install on its primary")
    if facts.superuser:
        return Check(name="privileges", status="ok", found=f"role {facts.role} is a superuser")
    create = "may" if facts.may_create else "may not"
    return Check(
        name="privileges",
        status="warn" if facts.pgvae_installed else "fail",
        found=f"role {facts.role} is no superuser, and {create} create schemas in database {facts.database}",
        remedy=f"run pgvae install with the DSN of a superuser; scoring and reading need none; {WITHOUT_PYTHON}",
    )


def check_language(facts: Facts) -> Check:
    """PL/Python is installed in the database, or can be."""
    if facts.plpython_installed:
        return Check(name="plpython3u", status="ok", found="installed in this database")
    if facts.plpython_available:
        return Check(name="plpython3u", status="ok", found="available; pgvae install creates it")
    return Check(
        name="plpython3u",
        status="fail",
        found="not available on the server",
        remedy=f"on the server: {package_command(facts, 'plpython3')}; {WITHOUT_PYTHON}",
    )


def check_python(report: dict[str, Any]) -> Check:
    """Names the Python that the server embeds: numpy and cupy must be built for this one."""
    library = ", ".join(report["libpython"]) or "linked statically"
    found = f"Python {report['python']} ({library}; prefix {report['prefix']})"
    if _release(report["python"]) < OLDEST_PYTHON:
        return Check(
            name="python",
            status="fail",
            found=f"{found}; pgvae needs {_dotted(OLDEST_PYTHON)}",
            remedy="PL/Python comes with the Python of the system: a newer one has it, such as Debian 12, Ubuntu 22.04"
            " or Red Hat Enterprise Linux 10",
        )
    return Check(name="python", status="ok", found=found)


def check_numpy(report: dict[str, Any], facts: Facts) -> Check:
    """numpy imports inside the server, and is new enough."""
    numpy = report["numpy"]
    if "error" in numpy:
        return Check(
            name="numpy",
            status="fail",
            found=f"does not import: {numpy['error']}",
            remedy=f"on the server: {package_command(facts, 'numpy')} (it must be of Python {_minor(report)})",
        )
    found = f"numpy {numpy['version']} ({numpy['file']})"
    if _release(numpy["version"]) < OLDEST_NUMPY:
        wanted = f"numpy>={_dotted(OLDEST_NUMPY)}"
        return Check(
            name="numpy",
            status="fail",
            found=f"{found}; pgvae needs {_dotted(OLDEST_NUMPY)}",
            remedy=f"on the server: sudo python{_minor(report)} -m pip install --break-system-packages '{wanted}'",
        )
    return Check(name="numpy", status="ok", found=found)


def check_blas(report: dict[str, Any], facts: Facts) -> Check | None:
    """The matrix product is a tuned one; None where there is no numpy to ask."""
    if "blas" not in report:
        return None
    gflops = report["blas"]["gflops"]
    libraries = report["blas"]["libraries"]
    names = " ".join(libraries).lower()
    tuned = next((name for word, name in _TUNED.items() if word in names), None)
    speed = f"{gflops:.0f} GFLOP/s"
    if report["blas"].get("is_outdated"):
        return Check(
            name="blas",
            status="info",
            found=f"{tuned}, {speed}: it is older than this processor, and uses the kernels of a Prescott of 2004",
            remedy="pgvae's functions choose better ones by themselves; for whatever else computes in this server, set"
            " OPENBLAS_CORETYPE=Haswell in its environment, or SkylakeX where the processor has AVX-512",
        )
    if tuned:
        return Check(name="blas", status="ok", found=f"{tuned}, {speed}")
    if gflops >= SLOW_GFLOPS:
        return Check(name="blas", status="ok", found=f"{', '.join(libraries) or 'unknown library'}, {speed}")
    return Check(
        name="blas",
        status="warn",
        found=f"the reference library, slow: {speed} ({', '.join(libraries) or 'unknown library'})",
        remedy=f"on the server: {package_command(facts, 'openblas')}; new sessions then use it",
    )


def check_gpu(report: dict[str, Any]) -> Check:
    """CuPy sees a device; without one NumPy scores."""
    cupy = report["cupy"]
    # CuPy's package holds none of CUDA's libraries; [ctk] brings them.
    install = f"on the server: sudo python{_minor(report)} -m pip install --break-system-packages 'cupy-cuda12x[ctk]'"
    if "absent" in cupy:
        if report["gpu_driver"]:
            found = "there is a GPU, but cupy is not installed: the CPU scores"
            return Check(name="gpu", status="warn", found=found, remedy=install)
        return Check(name="gpu", status="info", found="none; the CPU scores")
    if "error" in cupy:
        version = cupy.get("version", "of unknown version")
        return Check(
            name="gpu",
            status="warn",
            found=f"cupy {version} finds no usable device, the CPU scores: {cupy['error']}",
            remedy="run nvidia-smi on the server as the user who runs PostgreSQL, and check its driver",
        )
    if not cupy["devices"]:
        return Check(name="gpu", status="info", found=f"cupy {cupy['version']}, no device; the CPU scores")
    if "libraries" in cupy:
        found = f"cupy {cupy['version']} lacks CUDA's libraries, the CPU scores: {cupy['libraries']}"
        return Check(name="gpu", status="warn", found=found, remedy=install)
    return Check(name="gpu", status="ok", found=f"cupy {cupy['version']}, {', '.join(cupy['devices'])}")


def check_disk(report: dict[str, Any]) -> Check | None:
    """There is room beside the data; None where the server cannot tell."""
    if "disk_free" not in report:
        return None
    free = report["disk_free"]
    found = f"{free / 1e9:.1f} GB free on the disk of the data directory"
    if free < LOW_DISK_BYTES:
        return Check(
            name="disk", status="warn", found=found, remedy="free some space: versions and predictions need it"
        )
    return Check(name="disk", status="ok", found=found)


def check_cron(facts: Facts) -> Check:
    """pg_cron can refresh predictions from inside the database; any other scheduler does as well."""
    if facts.cron_installed:
        return Check(name="pg_cron", status="ok", found="installed in this database")
    if not facts.cron_available:
        return Check(
            name="pg_cron",
            status="info",
            found="not available; optional, for refreshes scheduled inside the database",
            remedy=f"on the server: {package_command(facts, 'cron')}",
        )
    if facts.cron_preloaded is False:
        return Check(
            name="pg_cron",
            status="info",
            found="available, not preloaded; optional",
            remedy="add pg_cron to shared_preload_libraries (after what is there already) and restart the server",
        )
    return Check(
        name="pg_cron",
        status="info",
        found="available, not installed in this database; optional",
        remedy="create extension pg_cron (in the database that the setting cron.database_name names)",
    )


def check_installation(facts: Facts, code: tuple[str, str] | None) -> Check:
    """pgvae is installed in the database, with the code of this command: what it trains can then be activated there."""
    if not facts.pgvae_installed:
        return Check(
            name="pgvae", status="info", found=f"not installed in database {facts.database}", remedy="pgvae install"
        )
    if code is None:
        found = f"installed in database {facts.database}; role {facts.role} may not read which release"
        return Check(name="pgvae", status="ok", found=found)
    release, digest = code
    if not release:
        return Check(
            name="pgvae",
            status="fail",
            found=f"database {facts.database} holds pgvae's tables without their rows,"
            " as after a restore of a dump with --schema-only",
            remedy="restore with the data of the schemas vae and vae_private; pgvae install says how to begin anew",
        )
    own = resources.runtime_digest()
    if digest == own:
        return Check(name="pgvae", status="ok", found=f"pgvae {release}, installed in database {facts.database}")
    return Check(
        name="pgvae",
        status="warn",
        found=f"database {facts.database} holds the code of pgvae {release} ({digest[:12]}), this one is {__version__}"
        f" ({own[:12]}): pgvae train refuses to train for it",
        remedy="pgvae install upgrades the database; where that is newer: pip install pgvae==…",
    )


def package_command(facts: Facts, piece: Literal["plpython3", "numpy", "openblas", "cron"]) -> str:
    """Gives the command that installs a piece beside this server, by the packages that it came from."""
    if "Red Hat" in facts.version_text:
        packages = {
            "plpython3": f"postgresql{facts.version}-plpython3",
            "numpy": "python3-numpy",
            "openblas": "openblas-threads",
            "cron": f"pg_cron_{facts.version}",
        }
        return f"sudo dnf install {packages[piece]}"
    packages = {
        "plpython3": f"postgresql-plpython3-{facts.version}",
        "numpy": "python3-numpy",
        "openblas": "libopenblas0-pthread",
        "cron": f"postgresql-{facts.version}-cron",
    }
    return f"sudo apt install {packages[piece]}"


# What the file name of a loaded library says about it, the most telling first.
_TUNED = {"mkl": "Intel MKL", "blis": "BLIS", "openblas": "OpenBLAS", "atlas": "ATLAS"}


def check_inside(connection: psycopg.Connection, facts: Facts) -> list[Check]:
    """Gives what Python inside the server has of what pgvae needs; needs a superuser and PL/Python."""
    try:
        report = inspect_python(connection, facts)
    except psycopg.Error as error:
        message = " ".join(str(error.diag.message_primary or error).split())
        return [
            Check(
                name="python",
                status="fail",
                found=f"plpython3u does not run: {message}",
                remedy="read the server's log; a PYTHONHOME or PYTHONPATH in its environment can be the cause",
            )
        ]
    found = [
        check_python(report),
        check_numpy(report, facts),
        check_blas(report, facts),
        check_gpu(report),
        check_disk(report),
    ]
    return [check for check in found if check is not None]


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _minor(report: dict[str, Any]) -> str:
    return _dotted(_release(report["python"]))
