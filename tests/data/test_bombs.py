"""Hostile sources: files that grow when they are opened, and lists that name what is none of theirs. Memory is bounded,
what cannot be read is listed, and the images beside it are packed."""

import contextlib
import csv
import io
import os
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.source import open_source
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
GOOD = 4


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    Image.fromarray(pixels).resize((30, 20)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def packed(source: Path, tmp_path: Path) -> tuple[dict[str, str], int, str]:
    """Pack a source by the command; {what was left out: why}, the most memory its processes took, what it said."""
    command = [sys.executable, "-m", "pipeline.pack", "--data", str(source), "--cache", str(tmp_path / "cache")]
    command += ["--workers", "1", "--max-rejected", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        tree, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            resident = 0
            for one in [tree, *_children(tree)]:
                with contextlib.suppress(psutil.Error):
                    resident += one.memory_info().rss
            peak = max(peak, resident)
            time.sleep(0.01)
    lists = list((tmp_path / "cache").glob("*/rejected.csv"))
    rows = csv.DictReader(io.StringIO(lists[0].read_text())) if lists else []
    return {row["path"]: row["reason"] for row in rows}, peak, (tmp_path / "said").read_text()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def flat_png(side: int) -> bytes:
    """A black image of `side` x `side` pixels of one bit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    row = bytes(1 + (side + 7) // 8)
    squeezed = zlib.compressobj(9)
    body = b"".join(squeezed.compress(row * 1000) for _ in range(side // 1000)) + squeezed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


class Squeezed:
    """A .tar.gz in the making, into which megabytes of zeros go at the cost of a few bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.parts = [b"\x1f\x8b\x08\0\0\0\0\0\0\xff"]
        zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.checksum, self.length = 0, 0
        self.megabyte = zeros.compress(bytes(MB)) + zeros.flush(zlib.Z_FULL_FLUSH)

    def write(self, content: bytes) -> None:
        self.checksum, self.length = zlib.crc32(content, self.checksum), self.length + len(content)
        self.parts.append(self.deflate.compress(content) + self.deflate.flush(zlib.Z_FULL_FLUSH))

    def zeros(self, megabytes: int) -> None:
        self.parts += [self.megabyte] * megabytes
        self.length += megabytes * MB
        for _ in range(megabytes):
            self.checksum = zlib.crc32(bytes(MB), self.checksum)

    def member(self, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        self.write(info.tobuf(tarfile.GNU_FORMAT))

    def image(self, name: str, content: bytes) -> None:
        self.member(name, len(content))
        self.write(content + bytes(-len(content) % 512))

    def close(self) -> None:
        self.write(bytes(1024))
        end = self.checksum.to_bytes(4, "little") + (self.length % (1 << 32)).to_bytes(4, "little")
        self.path.write_bytes(b"".join(self.parts) + self.deflate.flush() + end)


def test_a_huge_flat_png_is_listed_and_never_decoded(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(GOOD):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "photos" / "bomb.png").write_bytes(flat_png(50_000))
    assert (tmp_path / "photos" / "bomb.png").stat().st_size < MB
    rejected, peak, said = packed(tmp_path / "photos", tmp_path)
    assert rejected == {"bomb.png": "too large: over 134 megapixels"}, said
    assert f"{GOOD} images" in said
    assert peak < 400 * MB  # as much as packing takes anyhow; decoded it has 2,500 MB


def test_members_of_zeros_are_listed(tmp_path):
    archive = Squeezed(tmp_path / "photos.tar.gz")
    for i in range(2):
        archive.image(f"{i}.jpg", jpeg(i))
    archive.member("too_large.jpg", 640 * MB)
    archive.zeros(640)
    archive.member("zeros.jpg", 256 * MB)
    archive.zeros(256)
    archive.member("looks_like_one.jpg", 128 * MB)
    archive.write(jpeg(0)[:512])
    archive.write(bytes(MB - 512))
    archive.zeros(127)
    for i in range(2, GOOD):
        archive.image(f"{i}.jpg", jpeg(i))
    archive.close()
    assert archive.path.stat().st_size < 2 * MB
    rejected, peak, said = packed(archive.path, tmp_path)
    assert {name: reason.split(":")[0] for name, reason in rejected.items()} == {
        "too_large.jpg": "too large", "zeros.jpg": "not an image", "looks_like_one.jpg": "truncated",
    }, said  # fmt: skip
    assert f"{GOOD} images" in said
    assert (
        peak < 1000 * MB
    )  # of the 1,024 MB only the 128 of what looks like an image were held, here and in the decoder


def test_labels_of_a_tar_take_no_more_memory_than_labels(tmp_path):
    archive = Squeezed(tmp_path / "photos.tar.gz")
    for i in range(GOOD):
        archive.image(f"{i}.jpg", jpeg(i))
    for i in range(400):
        archive.member(f"{i}.txt", MB)
        archive.write(b"x")
        archive.write(bytes(MB - 1))
    archive.close()
    _, peak, said = packed(archive.path, tmp_path)
    assert f"{GOOD} images" in said
    assert peak < 400 * MB


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_header_that_never_ends_is_refused(tmp_path, kind):
    archive = Squeezed(tmp_path / "photos.tar.gz")
    archive.image("0.jpg", jpeg(0))
    archive.member("header", 2048 * MB, kind)
    archive.zeros(2048)
    archive.close()
    _, peak, said = packed(archive.path, tmp_path)
    assert "a damaged archive, after 1 files" in said
    assert "a header of 2,147,483,648 bytes" in said or "sparse" in said
    assert peak < 400 * MB


def test_an_archive_that_grows_without_end_is_refused(tmp_path):
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 100 << 30
    archive = Squeezed(tmp_path / "photos.tar.gz")
    archive.image("0.jpg", jpeg(0))
    archive.write(info.tobuf(tarfile.GNU_FORMAT))  # nothing follows: it is refused for what it claims
    archive.close()
    with pytest.raises(UserError, match="grows to 107 GB"):
        _ = open_source(str(archive.path)).items


def test_a_plain_tar_of_a_hole_is_listed(tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(GOOD):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(jpeg(i))
            archive.addfile(info, io.BytesIO(jpeg(i)))
        info = tarfile.TarInfo("hole.jpg")
        info.size = 100 << 30
        archive.addfile(info)
        end = archive.offset
    os.truncate(path, end + info.size + 1024)
    rejected, peak, said = packed(path, tmp_path)
    assert rejected == {"hole.jpg": "not an image: it begins with zero bytes"}, said
    assert peak < 400 * MB


def test_one_huge_value_for_all_rows_of_a_parquet_is_listed(tmp_path):
    huge = 80 * MB
    values = pa.array([jpeg(i) for i in range(GOOD)] + [bytes(huge)], pa.binary())
    rows = pa.DictionaryArray.from_arrays(pa.array([0, 1, *[GOOD] * 60, 2, 3], pa.int32()), values)
    path = tmp_path / "photos.parquet"
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2 * huge, "store_schema": False}
    pq.write_table(pa.table({"image": rows}), path, **options)
    assert path.stat().st_size < MB
    _, peak, said = packed(path, tmp_path)
    assert f"{GOOD} images" in said
    assert "60 not an image" in said
    assert peak < 900 * MB  # of 4,800


def test_huge_labels_of_a_parquet_are_refused(tmp_path):
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (8 * MB)]))
    path = tmp_path / "photos.parquet"
    table = pa.table({"image": pa.array([jpeg(0)] * 2000, pa.binary()), "label": labels})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=16 * MB)
    assert path.stat().st_size < 4 * MB
    _, peak, said = packed(path, tmp_path)
    assert "error:" in said
    assert "the labels in its column label are texts of over 1000 bytes" in said
    assert peak < 600 * MB  # of 16,000


def test_a_table_may_name_any_file_of_its_user_and_tells_nothing_of_what_is_no_image(tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"my secret words")
    (tmp_path / "list").mkdir()
    for i in range(GOOD):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    os.mkfifo(tmp_path / "pipe")
    others = ["/etc/passwd", "../secret.txt", "/dev/zero", "/dev/stdin", "../pipe", "/", "nosuch://x/1.jpg"]
    table = tmp_path / "list" / "photos.csv"
    table.write_text("path\n" + "".join(f"../{i}.jpg\n" for i in range(GOOD)) + "\n".join(others) + "\n")
    rejected, peak, said = packed(table, tmp_path)
    assert f"{GOOD} images" in said
    assert set(rejected) == set(others), said
    assert rejected["/"] == "unreadable: Is a directory"
    for name in ("/dev/zero", "/dev/stdin", "../pipe"):
        assert rejected[name] == "not an image: not a regular file"
    assert rejected["/etc/passwd"].startswith("not an image: ")
    assert rejected["nosuch://x/1.jpg"].startswith("unreadable: ")
    left = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert b"secret words" not in left
    assert b"root:" not in left
    assert peak < 500 * MB


def test_a_remote_table_names_no_file_of_this_machine(tmp_path):
    (tmp_path / "private.jpg").write_bytes(jpeg(0))
    files = fsspec.filesystem("memory")
    files.pipe("/lists/1.jpg", jpeg(1))
    names = [f"file://{tmp_path}/private.jpg", f"local://{tmp_path}/private.jpg", f"{tmp_path}/private.jpg", "1.jpg"]
    files.pipe("/lists/photos.csv", ("path\n" + "\n".join(names) + "\n").encode())
    try:
        source = open_source("memory://lists/photos.csv")
        found = [payload for _, payload in source.payloads(source.wanted())]
    finally:
        files.store.clear()
    assert found[3] == jpeg(1)
    assert [payload.reason.split(":")[0] for payload in found[:3]] == ["refused", "refused", "unreadable"]


def test_a_table_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "a.csv").write_text("path\n" + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match="is no table"):
        _ = open_source(str(tmp_path / "a.csv")).items
    (tmp_path / "b.csv").write_text("path\n")
    os.truncate(tmp_path / "b.csv", 5 << 30)
    with pytest.raises(UserError, match="5 GB are no table of paths"):
        _ = open_source(str(tmp_path / "b.csv")).items
