"""Addresses, local or remote, through fsspec: finding, identifying and fetching what is there."""

import difflib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.listing import Payload
from pipeline.data.workers import Unreadable
from pipeline.errors import UserError

KEYLESS = re.compile(r"(?:s3a?|gc?s)://[^/@]+@|(?:s3a?|gc?s)://[^/@:]+:.+@")
AT_ONCE = 64  # files fetched at a time
TRIES = 3
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "mtime", "LastModified", "last_modified", "created")


def given(address: str) -> str:
    """An address as it was given: itself, or for `$NAME` what that variable holds. Raises `UserError` where it is not.

    So that no command line, no process list, no configuration and no job needs to hold a secret.
    """
    if not re.fullmatch(r"\$[A-Za-z_]\w*", address):
        return address
    if not (found := os.environ.get(address[1:], "").strip()):
        raise UserError(f"--data '{address}': the variable {address[1:]} is not set")
    return found


def locate(address: str) -> tuple[fsspec.AbstractFileSystem, str, dict[str, Any]]:
    """(file system, path within it, fsspec's facts about it). Raises `UserError` where it is not or out of reach."""
    if KEYLESS.match(address):
        raise UserError(
            f"{address}: no credentials can stand in such an address; give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if "://" in address or "::" in address:
        try:
            files, path = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise UserError(f"{address}: {said(error)}") from error
    else:
        files, path = LocalFileSystem(), os.path.abspath(os.path.expanduser(address))
    try:
        return files, path, files.info(path)
    except FileNotFoundError:
        raise UserError(f"{address}: no such file or folder{_did_you_mean(address, files, path)}") from None
    except Exception as error:
        raise UserError(f"{address}: cannot be reached ({said(error)})") from error


def is_local(files: fsspec.AbstractFileSystem) -> bool:
    """Whether these files lie on this machine's disk."""
    return isinstance(files, LocalFileSystem)


def version(info: dict[str, Any]) -> str:
    """What tells two states of a file apart, from fsspec's facts about it."""
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def fetch(files: fsspec.AbstractFileSystem, paths: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Payload]]:
    """(index, bytes) of each (index, path). A file that is not there is `Unreadable`.

    Raises `UserError` where a file exists but cannot be had in three tries: the place is out of reach.
    """
    remaining = iter(paths)
    while batch := list(islice(remaining, AT_ONCE)):
        got: dict[int, Payload] = {}
        for attempt in range(TRIES):
            missing = [(index, path) for index, path in batch if index not in got]
            if missing:
                time.sleep(attempt)
                got.update(_fetch_once(files, missing, last=attempt == TRIES - 1))
        yield from ((index, got[index]) for index, _ in batch)


def _fetch_once(
    files: fsspec.AbstractFileSystem, batch: Sequence[tuple[int, str]], last: bool
) -> Iterator[tuple[int, Payload]]:
    paths = [path for _, path in batch]
    for (index, path), result in zip(batch, files.cat_ranges(paths, None, None, on_error="return")):
        if isinstance(result, bytes):
            yield index, result
        elif isinstance(result, (FileNotFoundError, PermissionError, IsADirectoryError)):
            yield index, Unreadable(f"unreadable: {result.strerror or type(result).__name__}")
        elif last:
            raise UserError(f"{files.unstrip_protocol(path)}: cannot be fetched ({said(result)}); try again")


def _did_you_mean(address: str, files: fsspec.AbstractFileSystem, path: str) -> str:
    folder, name = os.path.split(path)
    if not (is_local(files) and os.path.isdir(folder)):
        return ""
    near = difflib.get_close_matches(name, os.listdir(folder), n=2)
    near = [os.path.join(os.path.dirname(address.rstrip("/")), found) for found in near]
    return f"; did you mean {' or '.join(near)}?" if near else ""
