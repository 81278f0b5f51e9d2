"""Files that appear whole or not at all, the sums by which they are known again, and texts made from templates."""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it over the target."""
    # Two machines may write one file of a shared folder, from processes of one number.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's bytes: no defence against anybody, but fast enough for checkpoints."""
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def filled(template: Path, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Return a Jinja template with these values, each of which it must find; in ``*.html.j2`` all text is escaped."""
    environment = Environment(
        autoescape=template.name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters or {}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
