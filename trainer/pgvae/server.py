"""The embedded server: a private PostgreSQL cluster in its own directory.

It has no effect on any other server of the machine: its own data, its own socket directory that only its owner can
enter, no TCP port unless one is asked for. PostgreSQL refuses to run as root, so for root it runs as `postgres`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgvae.errors import PgvaeError
from pgvae.files import home_folder, write_file

SUPERUSER = "postgres"
DATABASE = "pgvae"

# A socket's path has 107 bytes on Linux and 103 on macOS; PostgreSQL appends this name.
_SOCKET_PATH_LIMIT = 103
_SOCKET_NAME = ".s.PGSQL.65535"

# All that the server gets of the caller's environment. Python inside the server finds its library through `python3` on
# PATH, PYTHONPATH and the user's own packages: a virtual environment or another Python of the caller would replace the
# server's numpy or stop it from starting.
_PASSED_ON = ("TZ", "TMPDIR", "CUDA_", "CUPY_", "NVIDIA_", "OMP_", "OPENBLAS_", "MKL_")

_ROOM = "free some space, or choose another folder with PGVAE_HOME"

# What is local needs no password because nobody else can enter the socket's directory; a TCP port is open to every
# user of the machine, so it asks for one.
_HBA = """\
# Written by pgvae up; changes are lost.
local all         all               trust
local replication all               trust
host  all         all  127.0.0.1/32 scram-sha-256
host  all         all  ::1/128      scram-sha-256
"""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the embedded server is doing; `dsn` is None while it is down, `tcp_dsn` also where no port was asked for."""

    home: Path
    exists: bool
    running: bool
    version: str | None
    port: int | None
    dsn: str | None
    tcp_dsn: str | None
    log: Path


@dataclass(frozen=True)
class _Account:
    """The operating-system user that PostgreSQL runs as."""

    name: str
    uid: int
    gid: int
    home: str


class Server:
    """An embedded cluster whose every file lies in `home` (and in one socket directory where that path is too long)."""

    def __init__(self, home: Path, *, settings: Mapping[str, str] | None = None, bindir: Path | None = None) -> None:
        """Names a cluster; touches nothing.

        `settings` are lines of postgresql.conf, applied at the next start. `bindir` is the folder of initdb and
        pg_ctl; without it, the newest installation that has PL/Python.
        """
        self.home = home.expanduser().absolute()
        self.data = self.home / "data"
        self.log = self.home / "server.log"
        self._state_file = self.home / "server.json"
        self._password_file = self.home / "password"
        self._settings = dict(settings or {})
        self._bindir = bindir

    @classmethod
    def default(cls) -> Server:
        """Gives the cluster of the current user: PGVAE_HOME, else /var/lib/pgvae for root, else below XDG_DATA_HOME."""
        if chosen := os.environ.get("PGVAE_HOME"):
            _check_folder(Path(chosen))
            return cls(Path(chosen))
        if os.geteuid() == 0:
            return cls(Path("/var/lib/pgvae"))
        return cls(Path(os.environ.get("XDG_DATA_HOME") or home_folder() / ".local/share") / "pgvae")

    # Lifecycle

    def up(self, port: int | None = None) -> None:
        """Starts the server, and makes it first where there is none; calling it again changes nothing.

        Without `port` it keeps the one of its last start (at first: none, only the Unix socket); 0 closes the port
        again. A changed port restarts the server.
        """
        if port is not None and not 0 <= port <= 65535:
            raise PgvaeError(f"port {port} is not between 0 and 65535", hint="choose one above 1023, such as 5433")
        account = _account()
        _check_reachable(self.home, account)
        self._make_home()
        with self._lock():
            wanted = (self._port() or 0) if port is None else port
            if self.is_running() and wanted != (self._port() or 0):
                _check_free(wanted)
                self._stop(account)
            if not self.is_running():
                if not self.data.exists():
                    self._init(account)
                self._configure(wanted, account)
                self._start(wanted, account)
            self._make_database()
            if wanted:
                self._set_password()
            self._write_state(wanted or None)

    def down(self) -> bool:
        """Stops the server and says whether it ran; its data stays."""
        if not self.is_running():
            return False
        with self._lock():
            self._stop(_account())
        return True

    def remove(self) -> None:
        """Stops the server and removes its data, log and password; nothing else that lies in its home."""
        if not self._state_file.exists():
            return
        self.down()
        sockets = self._socket_directory()
        for tree in (self.data, self.home / "data.new", sockets):
            shutil.rmtree(tree, ignore_errors=True)
        for file in (self.log, self._password_file, self._state_file, self.home / "lock"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.home.rmdir()

    # What others ask

    def is_running(self) -> bool:
        """Says whether the server takes connections on its socket."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise PgvaeError(
                f"the embedded server in {self.home} belongs to another user",
                hint="run the command as that user, or choose a home of your own with PGVAE_HOME",
            ) from error
        if len(lines) < 5:
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(f"{lines[4]}/.s.PGSQL.{lines[3]}")
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def dsn(self, dbname: str = DATABASE) -> str:
        """Gives the connection string through the Unix socket; PgvaeError while the server is down."""
        if not self.is_running():
            raise PgvaeError("the embedded server is not running", hint="start it with: pgvae up")
        lines = (self.data / "postmaster.pid").read_text().splitlines()
        return make_conninfo(host=lines[4], port=lines[3], user=SUPERUSER, dbname=dbname)

    def tcp_dsn(self) -> str | None:
        """Gives the connection string, with its password, through the TCP port; None where no port was asked for."""
        port = self._port()
        if not port or not self.is_running():
            return None
        password = self._password_file.read_text().strip()
        return make_conninfo(host="localhost", port=port, user=SUPERUSER, password=password, dbname=DATABASE)

    def status(self) -> Status:
        """Gives the state of the server without changing it."""
        running = self.is_running()
        version = None
        if running:
            with psycopg.connect(self.dsn("postgres")) as connection:
                version = str(connection.execute("show server_version").fetchone()[0])  # type: ignore[index]
        return Status(
            home=self.home,
            exists=self.data.exists(),
            running=running,
            version=version,
            port=self._port(),
            dsn=self.dsn() if running else None,
            tcp_dsn=self.tcp_dsn(),
            log=self.log,
        )

    @property
    def bindir(self) -> Path:
        """The folder of the PostgreSQL programs that fit this cluster; PgvaeError where there is none."""
        if self._bindir is None:
            version_file = self.data / "PG_VERSION"
            self._bindir = find_bindir(int(version_file.read_text()) if version_file.exists() else None)
        return self._bindir

    # Steps

    def _make_home(self) -> None:
        # The account of the server has to pass through the home of root's cluster; nobody else's is anyone's business.
        mode = 0o755 if os.geteuid() == 0 else 0o700
        try:
            for directory in reversed([d for d in (self.home, *self.home.parents) if not d.exists()]):
                # Another start may make it at the same moment.
                directory.mkdir(exist_ok=True)
                directory.chmod(mode)
        except OSError as error:
            raise PgvaeError(
                f"cannot make {self.home}: {error.strerror}", hint="choose another folder with PGVAE_HOME"
            ) from error
        if self.data.exists() and not self._state_file.exists():
            raise PgvaeError(
                f"{self.data} was not made by pgvae",
                hint="choose another folder for the embedded server with PGVAE_HOME",
            )

    def _init(self, account: _Account) -> None:
        initdb = self.bindir / "initdb"
        self._write_state(None)
        # Made aside and renamed, so that an interrupted initdb leaves nothing that looks like a cluster.
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        _make_private(new, account)
        no_sync = ["-N"] if self._settings.get("fsync") == "off" else []
        _run([initdb, "-D", new, "-A", "trust", "-U", SUPERUSER, "-E", "UTF8", "--locale=C.UTF-8", *no_sync], account)
        with (new / "postgresql.conf").open("a") as file:
            file.write("\ninclude_if_exists = 'pgvae.conf'\n")
        new.rename(self.data)

    def _configure(self, port: int, account: _Account) -> None:
        sockets = self._socket_directory()
        _make_private(sockets, account)
        settings = {
            "listen_addresses": "localhost" if port else "",
            "port": str(port or 5432),
            "unix_socket_directories": f'"{sockets}"',
            "cluster_name": "pgvae",
            **self._settings,
        }
        quoted = {name: value.replace("\\", "\\\\").replace("'", "''") for name, value in settings.items()}
        lines = [f"{name} = '{value}'\n" for name, value in quoted.items()]
        _write_for(account, self.data / "pgvae.conf", "# Written by pgvae up; changes are lost.\n" + "".join(lines))
        _write_for(account, self.data / "pg_hba.conf", _HBA)

    def _start(self, port: int, account: _Account) -> None:
        self.log.touch(mode=0o640)
        if os.geteuid() == 0:
            os.chown(self.log, account.uid, account.gid)
        before = self.log.stat().st_size
        pg_ctl = self.bindir / "pg_ctl"
        try:
            _run([pg_ctl, "start", "-w", "-t", "120", "-D", self.data, "-l", self.log], account)
        except PgvaeError as error:
            with self.log.open(errors="replace") as file:
                file.seek(before)
                said = "".join(line for line in file if re.search("FATAL|ERROR|HINT|could not", line)).strip()
            if port:
                _check_free(port)
            raise PgvaeError(f"the embedded server did not start: {said}", hint=f"its log is {self.log}") from error

    def _stop(self, account: _Account) -> None:
        _run([self.bindir / "pg_ctl", "stop", "-w", "-t", "120", "-m", "fast", "-D", self.data], account)

    def _make_database(self) -> None:
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            if not connection.execute("select true from pg_database where datname = %s", [DATABASE]).fetchone():
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))

    def _set_password(self) -> None:
        if not self._password_file.exists():
            password = secrets.token_urlsafe(24) + "\n"
            write_file(self._password_file, password.encode(), hint=_ROOM, mode=0o600)
        password = self._password_file.read_text().strip()
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            # The verifier is computed here, so that the password never appears in the server's log.
            verifier = connection.pgconn.encrypt_password(password.encode(), SUPERUSER.encode(), b"scram-sha-256")
            connection.execute(
                sql.SQL("alter role {} password {}").format(sql.Identifier(SUPERUSER), sql.Literal(verifier.decode()))
            )

    # State

    def _socket_directory(self) -> Path:
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:16]
        candidates = [
            self.home / "run",
            Path(tempfile.gettempdir()) / f"pgvae-{digest}",
            Path("/tmp") / f"pgvae-{digest}",
        ]
        return next(
            (path for path in candidates if len(os.fsencode(path / _SOCKET_NAME)) <= _SOCKET_PATH_LIMIT), candidates[-1]
        )

    def _port(self) -> int | None:
        try:
            port = json.loads(self._state_file.read_text())["port"]
        except FileNotFoundError:
            return None
        return int(port) if port else None

    def _write_state(self, port: int | None) -> None:
        # In one step: a full disk or a kill would leave an empty file, of which no command could tell the port.
        write_file(self._state_file, (json.dumps({"port": port}) + "\n").encode(), hint=_ROOM)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Two commands that start or stop the same cluster wait for each other."""
        with (self.home / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def find_bindir(major: int | None = None) -> Path:
    """Gives the folder of the newest installation that has PL/Python, of version `major` where it is given.

    Looked for in PATH, in the places of Debian's and Red Hat's packages, and where pg_config points. PgvaeError
    where there is none.
    """
    candidates = [Path(found).resolve().parent for found in [shutil.which("pg_ctl")] if found]
    for pattern in ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "opt/homebrew/opt/postgresql@*/bin"):
        candidates += sorted(Path("/").glob(pattern), key=_digits, reverse=True)
    if pg_config := shutil.which("pg_config"):
        candidates.append(Path(_output([pg_config, "--bindir"])))
    usable = [path for path in candidates if (path / "initdb").exists() and (path / "pg_ctl").exists()]
    if major is not None:
        usable = [path for path in usable if _major(path) == major]
    for path in usable:
        if has_plpython(path):
            return path
    if usable:
        version = _major(usable[0])
        raise PgvaeError(
            f"PostgreSQL {version} in {usable[0]} has no PL/Python (plpython3u)",
            hint=f"on Debian and Ubuntu: sudo apt install postgresql-plpython3-{version} python3-numpy",
        )
    wanted = major or 15
    raise PgvaeError(
        f"PostgreSQL {major}, which made the cluster, is not installed" if major else "PostgreSQL is not installed",
        hint=f"on Debian 12: sudo apt install postgresql-{wanted} postgresql-plpython3-{wanted} python3-numpy",
    )


def has_plpython(bindir: Path) -> bool:
    """Says whether the installation with these programs can create the language plpython3u."""
    pg_config = bindir / "pg_config"
    if not pg_config.exists():
        return False
    return (Path(_output([pg_config, "--sharedir"])) / "extension" / "plpython3u.control").exists()


def _major(bindir: Path) -> int:
    found = re.search(r"\d+", _output([bindir / "initdb", "--version"]))
    return int(found[0]) if found else 0


def _digits(path: Path) -> int:
    found = re.search(r"\d+", str(path))
    return int(found[0]) if found else 0


def _output(command: list[Path | str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _account() -> _Account:
    """Gives the account that PostgreSQL runs as: the caller's own, or `postgres` where that is root."""
    if os.geteuid() != 0:
        user = pwd.getpwuid(os.geteuid())
    else:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            raise PgvaeError(
                "PostgreSQL refuses to run as root, and this machine has no user postgres",
                hint="make one: adduser --system --group --home /var/lib/postgresql postgres; or use another login",
            ) from None
    return _Account(user.pw_name, user.pw_uid, user.pw_gid, user.pw_dir)


def _check_reachable(home: Path, account: _Account) -> None:
    """Refuses a home that the server's account cannot reach, before anything is made."""
    if os.geteuid() != 0:
        return
    for directory in reversed(home.parents):
        if not directory.exists():
            return
        found = directory.stat()
        if found.st_uid == account.uid:
            enters = found.st_mode & stat.S_IXUSR
        elif found.st_gid == account.gid:
            enters = found.st_mode & stat.S_IXGRP
        else:
            enters = found.st_mode & stat.S_IXOTH
        if not enters:
            raise PgvaeError(
                f"the server runs as {account.name}, who cannot enter {directory}",
                hint="choose a folder that every user can reach: PGVAE_HOME=/var/lib/pgvae",
            )


def _check_folder(home: Path) -> None:
    """Refuses a home that is no folder, or lies beneath what is none, or where this user may not look."""
    try:
        # The nearest that is there.
        found = next(path for path in (home, *home.absolute().parents) if path.exists())
        (found / "data").exists()
        reason = None if found.is_dir() else "Not a directory"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise PgvaeError(f"PGVAE_HOME is {home}: {reason}", hint="choose another folder with PGVAE_HOME")


def _check_free(port: int) -> None:
    """Refuses a port that another program listens on, before a running server is stopped for it."""
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise PgvaeError(
                f"cannot listen on port {port}: {reason}", hint="choose another with: pgvae up --port PORT"
            ) from error


def _make_private(directory: Path, account: _Account) -> None:
    """Makes a folder that only the server's account can enter; refuses one that someone else put there."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(directory, account.uid, account.gid)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o077:
        raise PgvaeError(
            f"{directory} is not a private folder of {account.name}",
            hint="remove it, or choose another home with PGVAE_HOME",
        )


def _write_for(account: _Account, path: Path, text: str) -> None:
    path.write_text(text)
    if os.geteuid() == 0:
        os.chown(path, account.uid, account.gid)


def _run(command: Sequence[Path | str], account: _Account) -> None:
    """Runs a PostgreSQL program as the server's account, in an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    environment |= {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": account.home,
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
    }
    other: dict[str, object] = {}
    if os.geteuid() == 0:
        other = {"user": account.uid, "group": account.gid, "extra_groups": []}
    done = subprocess.run(
        command,
        env=environment,
        cwd="/",
        umask=0o077,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **other,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise PgvaeError(
            f"{Path(command[0]).name} failed: {done.stdout.strip()}", hint="the line above names the reason"
        )
