"""Tar archives: what is listed and read, in which order, with which labels."""

import io
import json
import os
import tarfile

import pytest

from pipeline.data.pack import open_split
from pipeline.data.source import open_source
from pipeline.errors import UserError
from tests.data.source_toys import jpeg, read, tar


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz")]
)
def test_a_tar_is_read_in_its_own_order(tmp_path, suffix, mode):
    members = {f"./set/{c}/{i}.jpg": jpeg(i) for i in range(3) for c in "ba"}
    members["set/b/notes.txt"] = b"hello"
    source = open_source(str(tar(tmp_path / f"photos{suffix}", members, mode)))
    keys = [item.key for item in source.items if not item.skip]
    assert keys == [name[2:] for name in members if name.endswith("jpg")]
    assert read(source) == {n[2:]: (n[6], c) for n, c in members.items() if n.endswith("jpg")}
    assert [item.skip for item in source.items if item.key.endswith("txt")] == ["not an image: by its name (.txt)"]


def test_a_tar_never_reaches_outside(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../../outside.jpg", "/absolute.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(0))
            archive.addfile(info, io.BytesIO(jpeg(0)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{ord(kind)}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = set(tmp_path.rglob("*"))
    source = open_source(str(path))
    assert list(read(source)) == ["outside.jpg", "absolute.jpg", "good.jpg"]
    assert sum("not a regular file" in item.skip for item in source.items) == 4
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("companion", "label"),
    [
        ("cls", lambda c: c.encode()),
        ("json", lambda c: json.dumps({"label": c, "caption": "x"}).encode()),
        ("txt", lambda c: c.encode()),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_companions_are_labels(tmp_path, companion, label, mode):
    members = {}
    for i in range(8):
        members[f"{i:06}.jpg"] = jpeg(i)
        members[f"{i:06}.{companion}"] = label("cat" if i % 2 else "dog")
    source = open_source(str(tar(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), members, mode)))
    found = read(source)
    assert [label for label, _ in found.values()] == ["dog", "cat"] * 4
    assert len(source.items) == 8


def test_captions_are_no_labels(tmp_path):
    members = {f"{i}.{kind}": content for i in range(8) for kind, content in (("jpg", jpeg(i)), ("txt", b"a %d" % i))}
    assert {label for label, _ in read(open_source(str(tar(tmp_path / "a.tar", members)))).values()} == {None}


def test_a_folder_of_shards_and_their_division(tmp_path):
    for part in ("train", "val"):
        for n in range(2):
            tar(tmp_path / f"{part}-{n:03}.tar", {f"{c}/{part}{n}.jpg": jpeg(n) for c in "ab"})
    source = open_source(str(tmp_path))
    parts = source.parts()
    assert [source.items[i].key for i in parts["val"]] == [
        f"val-{n:03}.tar/{c}/val{n}.jpg" for n in range(2) for c in "ab"
    ]
    assert source.labels(parts["val"]) == ["a", "b", "a", "b"]
    train, val, _ = open_split(str(tmp_path), None, tmp_path / "cache")
    assert (train.images, val.images, train.classes) == (4, 4, ("a", "b"))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_damaged_archive_is_a_sentence(tmp_path, suffix):
    members = {f"{i}.jpg": os.urandom(20_000) for i in range(9)}
    whole = tar(tmp_path / f"a{suffix}", members, "w:gz" if "gz" in suffix else "w").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) // 2 - 300])
    (tmp_path / f"no{suffix}").write_bytes(b"junk" * 1000)
    for name in ("cut", "no"):
        with pytest.raises(UserError, match=rf"{name}{suffix}: a damaged archive"):
            read(open_source(str(tmp_path / f"{name}{suffix}")))
