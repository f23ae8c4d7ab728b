"""A real server of its own for the whole run, and databases cloned from one migrated template."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgvae.errors import PgvaeError
from pgvae.server import Server, find_bindir

# Durability is of no use to a throwaway server, and costs time.
FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "64MB",
    # It may be kept in memory.
    "max_wal_size": "128MB",
    # Its files lie among the server's own, and go with them: those in /dev/shm stay where it is killed.
    "dynamic_shared_memory_type": "mmap",
}

# Hundreds of databases are made and dropped, of 300 files each: in memory one takes 15 ms, on a disk up to 300.
MEMORY = Path("/dev/shm")

# pytest runs a worker per core: one thread for each is faster than two. Before PyTorch reads it.
os.environ["OMP_NUM_THREADS"] = "1"

# Of minutes each; begun last, one of them would leave the other cores without work.
LONG = ("test_docs.py", "test_tune.py", "test_online_retail.py", "test_demo.py", "test_survival.py")

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; with --no-loadscope-reorder they are begun in this order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Rewrite the files of tests/golden from what is.")
    drills = parser.getgroup("drills", "how long the drills of tests/test_drills.py are; make survival makes them long")
    drills.addoption("--drill-sessions", type=int, default=8, help="Sessions that score while versions change.")
    drills.addoption("--drill-seconds", type=float, default=4, help="Seconds that they do.")
    drills.addoption("--drill-kills", type=int, default=2, help="Kills in each kind of act.")
    drills.addoption("--drill-trainers", type=int, default=0, help="Trainers that are killed.")
    drills.addoption("--drill-report", help="File for the counts.")


def make_folder(parent: Path) -> Path:
    """Makes a folder that the server's account can enter; removes those of killed runs, with their servers."""
    for left in parent.glob("pgvae-test-*-*") if Path("/proc/self").exists() else ():
        if not Path("/proc", left.name.split("-")[2]).exists():
            # Another run may be at it.
            with suppress(PgvaeError, OSError):
                for state in left.glob("*/server.json"):
                    Server(state.parent).remove()
                shutil.rmtree(left)
    directory = Path(tempfile.mkdtemp(prefix=f"pgvae-test-{os.getpid()}-", dir=parent))
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder that the server's account can enter, which pytest's own folders are not."""
    directory = make_folder(Path(tempfile.gettempdir()))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A throwaway server, running, in memory where there is a GB of it for each of pytest's workers."""
    has_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > (os.cpu_count() or 1) * 2**30
    directory = make_folder(MEMORY if has_memory else Path(tempfile.gettempdir()))
    throwaway = Server(directory / "server", settings=FAST)
    throwaway.up()
    yield throwaway
    throwaway.remove()
    directory.rmdir()


@pytest.fixture(scope="session")
def server_without_plpython(scratch: Path) -> Iterator[Server]:
    """A running server of an installation that has no PL/Python, as of a database host where nobody added the package.

    PostgreSQL looks for its files relative to its program, so copies of the programs beside a filtered folder of
    extensions are such an installation.
    """
    bindir = find_bindir()
    bindir_of, sharedir, libdir = (_pg_config(bindir, name) for name in ("--bindir", "--sharedir", "--pkglibdir"))
    common = Path(os.path.commonpath([bindir_of, sharedir, libdir]))
    copy = {path: scratch / "without-plpython" / path.relative_to(common) for path in (bindir_of, sharedir, libdir)}
    copy[bindir_of].mkdir(parents=True)
    for program in ("postgres", "initdb", "pg_ctl", "pg_config"):
        shutil.copy2(bindir / program, copy[bindir_of] / program)
    copy[libdir].parent.mkdir(parents=True, exist_ok=True)
    copy[libdir].symlink_to(libdir)
    (copy[sharedir] / "extension").mkdir(parents=True)
    for folder in (sharedir, sharedir / "extension"):
        for path in folder.iterdir():
            target = copy[sharedir] / path.relative_to(sharedir)
            if not target.exists() and "plpython3u" not in path.name:
                target.symlink_to(path)
    throwaway = Server(scratch / "without-plpython-home", settings=FAST, bindir=copy[bindir_of])
    throwaway.up()
    yield throwaway
    throwaway.remove()


@pytest.fixture(scope="session")
def template(server: Server) -> str:
    """The name of a database in which pgvae is installed; nothing may stay connected to it."""
    from pgvae.install import install

    name = "pgvae_template"
    create_database(server, name)
    install(server.dsn(name))
    return name


@pytest.fixture
def database(server: Server, template: str) -> Iterator[str]:
    """The DSN of a fresh database in which pgvae is installed."""
    name = f"test_{next(_numbers)}"
    create_database(server, name, template)
    yield server.dsn(name)
    drop_database(server, name)


@pytest.fixture(scope="session")
def trained_template(server: Server, template: str) -> str:
    """The name of a database with a shop whose model is trained, active and refreshed."""
    from shop import Shop, train_and_activate

    name = "pgvae_trained_template"
    create_database(server, name, template)
    dsn = server.dsn(name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        Shop().make(connection)
        Shop().create_model(connection)
    train_and_activate(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("call vae.refresh('shop')")
    return name


@pytest.fixture
def trained_database(server: Server, trained_template: str) -> Iterator[str]:
    """The DSN of a fresh database with a tiny shop (shop.Shop) and its model `shop`, active and refreshed."""
    name = f"test_{next(_numbers)}"
    create_database(server, name, trained_template)
    yield server.dsn(name)
    drop_database(server, name)


@pytest.fixture
def trained(trained_database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection, as superuser, to `trained_database`."""
    with psycopg.connect(trained_database, autocommit=True) as opened:
        yield opened


@pytest.fixture
def empty_database(server: Server) -> Iterator[str]:
    """The DSN of a fresh database with nothing in it."""
    name = f"test_{next(_numbers)}"
    create_database(server, name)
    yield server.dsn(name)
    drop_database(server, name)


@pytest.fixture(scope="module")
def shared(server: Server, template: str) -> Iterator[psycopg.Connection]:
    """As `connection`, for those tests of a module that leave the database as they found it."""
    name = f"test_{next(_numbers)}"
    create_database(server, name, template)
    with psycopg.connect(server.dsn(name), autocommit=True) as opened:
        yield opened
    drop_database(server, name)


@pytest.fixture(scope="module")
def shared_trained(server: Server, trained_template: str) -> Iterator[psycopg.Connection]:
    """As `trained`, for those tests of a module that leave the database as they found it."""
    name = f"test_{next(_numbers)}"
    create_database(server, name, trained_template)
    with psycopg.connect(server.dsn(name), autocommit=True) as opened:
        yield opened
    drop_database(server, name)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection, as superuser, to `database`."""
    with psycopg.connect(database, autocommit=True) as opened:
        yield opened


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """The name of a login role without any privilege."""
    name = f"nobody_{next(_numbers)}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
    yield name
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def kernels_on_cpu(scratch: Path) -> Callable[[str, Sequence[str]], str]:
    """Gives the path of a library of CUDA kernels that runs on the CPU, by their source and options."""
    import cuda_on_cpu

    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no g++ to compile the CUDA kernels for the CPU with")
    return partial(cuda_on_cpu.build, folder=scratch)


@pytest.fixture
def cupy(kernels_on_cpu: Callable[[str, Sequence[str]], str]) -> Iterator[ModuleType]:
    """The stand-in for CuPy on a device that works, with 1 GB of memory; afterwards the device holds nothing."""
    import fake_cupy

    fake_cupy.reset(kernels_on_cpu)
    yield fake_cupy
    fake_cupy.state.failure = None
    assert fake_cupy.state.used == 0
    assert not fake_cupy.state.handles
    fake_cupy.reset(None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real data sets, which are too big for the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no data sets in {path}")
    return path


@pytest.fixture(scope="module")
def folder(scratch: Path) -> Path:
    """The folder in which the commands of a page of the documentation run."""
    return Path(tempfile.mkdtemp(prefix="page-", dir=scratch))


@pytest.fixture(scope="session")
def psql_folder(server: Server) -> Path:
    """Where psql and its companions are."""
    if not (server.bindir / "psql").exists():
        found = shutil.which("psql")
        assert found, "psql is missing"
        return Path(found).parent
    return server.bindir


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `pgvae ARGS…` in a process of its own: run_cli('status', dsn=database); in a fresh one with an `env`."""
    import command

    def run(
        *arguments: str, dsn: str | None = None, input: str | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **command.TERMINAL}
        environment.pop("PGVAE_DSN", None)
        environment |= {"PGVAE_DSN": dsn} if dsn else {}
        if env is None:
            return command.run(arguments, environment, input or "")
        return subprocess.run(
            [sys.executable, "-m", "pgvae.cli", *arguments],
            env=environment | env,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


def as_role(dsn: str, role: str) -> str:
    """Gives the DSN of the same database for another role."""
    return make_conninfo(**{**conninfo_to_dict(dsn), "user": role})


def _pg_config(bindir: Path, name: str) -> Path:
    return Path(subprocess.run([bindir / "pg_config", name], check=True, capture_output=True, text=True).stdout.strip())


def create_database(server: Server, name: str, template: str = "template1") -> None:
    """Creates a database, a clone of another one."""
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        query = sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        # A copy of the files, as all releases before 15 made it, is cheaper than writing all to the log.
        if admin.info.server_version >= 150_000:
            query += sql.SQL(" strategy file_copy")
        admin.execute(query)


def drop_database(server: Server, name: str) -> None:
    """Drops a database, whoever is connected to it."""
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
