"""Who is being called, told to a file: if the process ends in a contender, the next one leaves that out and goes on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 200  # bytes of a name


class Missing(Exception):
    """A contender cannot run a case here."""


class _Told:
    """Of the step that is being measured, if any."""

    file: int | None = None
    now: str = ""
    ended: Collection[str] = ()  # those that the process ended in


def _tell(name: str) -> None:
    _Told.now = name
    if _Told.file is not None:
        with suppress(OSError):  # a full disk
            os.pwrite(_Told.file, name.encode()[:LONGEST].ljust(LONGEST), 0)


@contextmanager
def calling(name: str) -> Iterator[None]:
    """Around whatever is a contender's own code. Missing, if the process ended in it before."""
    if name in _Told.ended:
        raise Missing("the process ended in it")
    before = _Told.now
    _tell(name)
    try:
        yield
    finally:
        _tell(before)


@contextmanager
def told(file: Path, ended: Collection[str]) -> Iterator[None]:
    """Inside, the file says who is called."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _Told.file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _Told.ended = ended
    try:
        yield
    finally:
        if _Told.file is not None:
            os.close(_Told.file)
        _Told.file, _Told.ended = None, ()
        file.unlink(missing_ok=True)


def last(file: Path) -> str:
    """Who was called as the process ended; nothing if nobody was."""
    return file.read_bytes().decode(errors="ignore").strip() if file.exists() else ""
