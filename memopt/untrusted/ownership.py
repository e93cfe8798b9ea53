"""Whether a folder and the files in it are the user's own, so that nobody else decides what is in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotOwn(OSError):
    """Somebody else owns it, or may write there; the message says who, and what to do."""


def own_directory(path: str | Path, make: bool = True) -> None:
    """Make the folder ``path`` if need be, open to the user alone. Raises :class:`NotOwn` for one that belongs to
    somebody else, or that others may write in: they could put links there, or take away what is in it."""
    if make:
        os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(20, "Not a directory", str(path))
    _refuse(found, f"the folder {path}")


def open_own(path: str | Path, flags: int) -> int:
    """A descriptor of the user's own file ``path``, made with mode 600 where ``flags`` has ``O_CREAT`` and it is not
    there. Raises :class:`NotOwn` for a link (also a second name of a file elsewhere), for what is no regular file, and
    for a file that others own or may write."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    if os.path.islink(path):
        raise NotOwn(40, f"{path} is a link; files here are opened without following any")
    descriptor = os.open(path, flags, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotOwn(22, f"{path} is not a file")
        if found.st_nlink > 1:
            raise NotOwn(31, f"{path} has a second name, and is perhaps a file of somebody else's")
        _refuse(found, f"{path}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse(found: os.stat_result, what: str) -> None:
    if not hasattr(os, "geteuid"):
        return  # this system has no such owners
    user = os.geteuid()
    if found.st_uid != user:
        raise NotOwn(1, f"{what} belongs to user {found.st_uid}, and this process runs as user {user}")
    # A group of the user's own, as many systems give each user, is nobody else.
    shared = bool(found.st_mode & stat.S_IWGRP) and not found.st_gid == os.getegid() == user
    if shared or found.st_mode & stat.S_IWOTH:
        who = "others" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise NotOwn(1, f"{what} can be written by {who} (mode {stat.S_IMODE(found.st_mode):o}): chmod go-w")
