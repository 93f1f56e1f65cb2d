"""What a file is, by its first bytes."""

import re

HEAD = 64  # bytes that `kind` needs
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
)
_NOT_IMAGES = (
    (b"version https://git-lfs", "a git LFS pointer: run `git lfs pull`"),
    (b"\0\x05\x16\x07", "a macOS side file"),
    (b"%PDF", "a PDF document"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
)


class Rejected(Exception):
    """This file cannot be trained on; the message is the reason, its part before a colon the kind of reason."""


class NotAnImage(Rejected):
    """This file never was an image: it counts as skipped, not as broken."""


def kind(head: bytes) -> str | None:
    """The image format that the first `HEAD` bytes of a file announce, or None."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if re.search(rb"heic|heix|hevc|heim|heis|mif1|msf1", brands):
            return "HEIF"
    if re.match(rb"P[1-6][\s#]", head):
        return "PPM"
    return None


def check_is_image(head: bytes) -> str:
    """The format of a file from its first `HEAD` bytes. Raises `NotAnImage`, or `Rejected` where it is empty."""
    if not head:
        raise Rejected("empty: 0 bytes")
    found = kind(head)
    if found is not None:
        return found
    for magic, what in _NOT_IMAGES:
        if head.startswith(magic):
            raise NotAnImage(f"not an image: {what}")
    text = head.lstrip().lower()
    if text.startswith((b"<svg", b"<?xml")):
        raise NotAnImage("not an image: SVG or other XML")
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise NotAnImage("not an image: a web page")
    if len(head) >= HEAD and not head.strip(b"\0"):
        raise NotAnImage("not an image: it begins with zero bytes")
    raise NotAnImage("not an image: no known format begins like this")


def begins_as_image(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file announce an image."""
    try:
        check_is_image(head)
    except Rejected:
        return False
    return True
