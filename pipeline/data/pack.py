"""Pack a source of images once into a .beton below a cache, split into train and val, and reuse it from then on.

cache/photos-3f2a91c07be4/train.beton   with what `pipeline.data.packed` keeps beside it
                          val.beton     where there is a validation part
                          done.json     written last: without it, the folder is packed again
cache/photos-3f2a91c07be4.lock          held while packing, released by the kernel when the process ends
cache/photos-3f2a91c07be4.rejected.csv  where too much was broken: path, reason
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.data.beton import BetonError
from pipeline.data.listing import Source
from pipeline.data.packed import Packed, read_packed, write_atomically
from pipeline.data.parts import Choice, Options, Progress, fill
from pipeline.data.remote import given, is_local, locate, said, version
from pipeline.data.source import open_source
from pipeline.data.workers import cores
from pipeline.errors import UserError
from pipeline.redaction import bare, hide

VERSION = 2  # of what packing does; a new one packs anew
MAX_REJECTED = 0.5

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Split(NamedTuple):
    """A training and a validation set, and a sentence on where the latter comes from."""

    train: Packed
    val: Packed | None
    note: str


def open_split(
    data: str,
    val_data: str | None,
    cache: str | Path,
    *,
    limit: int | None = None,
    resize: int | None = None,
    workers: int | None = None,
    max_rejected: float = MAX_REJECTED,
    hold_out: bool = False,
    on_progress: Progress | None = None,
) -> Split:
    """The packed training and validation images of `data`.

    Validation images are those of `val_data`; else those of an existing val part (folders or shards named train and
    val); else, where there are labels, one image in ten, chosen by a hash of its content, so that copies of an image
    never lie on both sides. Without labels nothing is held out unless `hold_out` is set.

    Args:
        data, val_data: anything `open_source` takes, or a .beton.
        cache: the folder that packed sets are kept in.
        limit: at most so many training images, always the same ones.
        resize: bring the shorter side down to so many pixels; None keeps the original JPEG bytes.
        workers: decoding processes; by default one to a core.
        max_rejected: the share of files that may be broken before packing stops.
        on_progress: called with (files done, files in all).

    Raises:
        UserError: nothing is there, nothing in it is an image, too much of it is broken, or the disk is full.
    """
    options = Options(limit, resize, workers or cores(), max_rejected, on_progress, hold_out)
    folder = Path(cache).expanduser()
    shown = None if val_data is None else hide(val_data)
    data, val_data = given(data), None if val_data is None else given(val_data)
    if val_data is None:
        return _packed(data, folder, options, "split")
    train = _packed(data, folder, options, "train").train
    val = _packed(val_data, folder, options._replace(limit=None), "val").train
    return Split(train, val, f"from {shown}" + (", the training images themselves" if val_data == data else ""))


def pack(
    address: str,
    cache: str | Path,
    *,
    limit: int | None = None,
    resize: int | None = None,
    workers: int | None = None,
    max_rejected: float = MAX_REJECTED,
    on_progress: Progress | None = None,
) -> Packed:
    """All images of one source as one packed set; arguments as of `open_split`."""
    options = Options(limit, resize, workers or cores(), max_rejected, on_progress)
    return _packed(given(address), Path(cache).expanduser(), options, "all").train


def _packed(address: str, cache: Path, options: Options, choice: Choice) -> Split:
    """The packed parts of one source: from the cache, or packed now. Without a division there is only `train`."""
    with _told(cache):
        source: Source | Packed
        if bare(address).endswith(".beton"):
            if options.resize:
                raise UserError(f"{address}: is packed already; --resize needs the images it was made of")
            source = _beton_here(address, cache)
            if choice != "split" and options.limit is None:
                return Split(source, None, "")
            identity = [source.fingerprint]
        else:
            source = open_source(address)
            identity = list(source.identity())
        key = hashlib.blake2b(digest_size=6)
        held = ["held out"] if options.hold_out else []
        for word in (VERSION, options.limit, options.resize, choice, *identity, *held):
            key.update(f"{word}\n".encode(errors="surrogateescape"))
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(bare(address).rstrip("/")).stem)[:40]
        folder = cache / f"{name}-{key.hexdigest()}"
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            return _read(folder) or _fill_anew(folder, address, source, options, choice)


@contextlib.contextmanager
def _told(cache: Path) -> Iterator[None]:
    """Have a cache that takes nothing told to the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{cache}: the disk is full; free some space, or give --cache another place") from error
        if error.errno in _UNWRITABLE and str(cache) in str(error):
            raise UserError(f"{cache}: cannot be written ({error.strerror}); give --cache another place") from error
        raise


def _read(folder: Path) -> Split | None:
    """What was packed into a folder, or None where packing did not end or its result was damaged since."""
    try:
        note = json.loads((folder / "done.json").read_text())["note"]
        val = folder / "val.beton"
        return Split(read_packed(folder / "train.beton"), read_packed(val) if val.exists() else None, note)
    except (BetonError, FileNotFoundError, ValueError, KeyError):
        return None


def _fill_anew(folder: Path, address: str, source: Source | Packed, options: Options, choice: Choice) -> Split:
    """Pack into an empty folder, which is gone again unless that succeeds."""
    shutil.rmtree(folder, ignore_errors=True)
    _sweep(folder.parent)
    folder.mkdir()
    try:
        note = fill(folder, address, source, options, choice)
        write_atomically(folder / "done.json", json.dumps({"source": hide(address), "note": note}) + "\n")
        done = _read(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if done is None:
        raise UserError(f"{folder}: what was packed cannot be read back; give --cache another place")
    return done


def _sweep(cache: Path) -> None:
    """Remove what interrupted runs left: folders that are not done and that no living process holds the lock of."""
    for path in cache.glob("*.lock"):
        folder = path.with_suffix("")
        if folder.is_dir() and not (folder / "done.json").is_file():
            with open(path) as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; a second process waits here, and a dead one's lock is gone with it."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("another process packs the same images; waiting for it …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _beton_here(address: str, cache: Path) -> Packed:
    """A .beton as a packed set; a remote one is brought into the cache first, and again where that copy is damaged."""
    files, path, info = locate(address)
    if is_local(files):
        return read_packed(path)
    key = hashlib.blake2b(f"{address} {version(info)}".encode(), digest_size=6).hexdigest()
    target = cache / f"{Path(bare(address)).stem}-{key}.beton"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        with contextlib.suppress(BetonError):
            return read_packed(target)
        partial = target.with_suffix(".partial")
        try:
            files.get_file(path, str(partial))
            partial.replace(target)
        except Exception as error:  # each kind of storage has its own
            if isinstance(error, OSError) and (error.errno in _FULL or str(cache) in str(error)):
                raise
            raise UserError(f"{address}: cannot be fetched ({said(error)}); try again") from error
        finally:
            partial.unlink(missing_ok=True)
        try:
            return read_packed(target)
        except BetonError as error:
            raise UserError(f"{address}: {error}") from error
