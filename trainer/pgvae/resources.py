"""Where `sql/`, `migrations/` and the runtime's modules lie: in the wheel, or in a checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pgvae_runtime
from pgvae.errors import PgvaeError

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent.parent


def directory(name: str) -> Path:
    """Gives the folder `sql` or `migrations`; PgvaeError where the installation is broken."""
    for parent in (_PACKAGE, _CHECKOUT):
        if (parent / name).is_dir():
            return parent / name
    raise PgvaeError(f"the folder {name} is missing from the installation", hint="pip install --force-reinstall pgvae")


def sql_files() -> list[Path]:
    """Gives the files of `sql/` in the order in which they are applied."""
    return sorted(directory("sql").glob("*.sql"))


def runtime_modules() -> dict[str, str]:
    """Gives the source of each module of pgvae_runtime by its name."""
    folder = Path(pgvae_runtime.__file__).parent
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def runtime_digest() -> str:
    """Gives the sha256 of the runtime's source: the name under which a database knows this code."""
    digest = hashlib.sha256()
    for name, source in runtime_modules().items():
        digest.update(f"{name}\0{len(source)}\0{source}".encode())
    return digest.hexdigest()
