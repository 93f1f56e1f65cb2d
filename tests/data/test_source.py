"""Folders, remote places and mistakes: what is listed, with which labels and parts, and what is read."""

import os
import socket
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from pipeline.data import remote
from pipeline.data.beton import BetonReader
from pipeline.data.listing import labels_from_folders
from pipeline.data.pack import open_split, pack
from pipeline.data.packed import read_names
from pipeline.data.source import open_source
from pipeline.data.workers import Unreadable
from pipeline.errors import UserError
from tests.data.source_toys import jpeg, read, tar, write
from tests.s3 import s3


def test_a_folder_of_any_depth_is_listed_in_order(tmp_path):
    names = [
        "b/2.jpg",
        "b/deep/er/1.PNG",
        "a/x.jpeg",
        "a/ünï côdé 图 (1).jpg",
        "b/dir.jpg/inside.jpg",
        "a/no_extension",
    ]
    contents = write(tmp_path, names)
    source = open_source(str(tmp_path))
    assert [item.key for item in source.items] == sorted(names)
    assert read(source) == {name: (name[0], content) for name, content in contents.items()}
    assert list(source.identity()) == list(open_source(str(tmp_path) + "/").identity())


def test_what_is_hidden_or_no_image_is_listed_with_its_reason(tmp_path):
    write(tmp_path, ["good.jpg", ".hidden.jpg", ".git/x.jpg", "__MACOSX/y.jpg", "notes.txt", "movie.mp4", "label.cls"])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    reasons = {item.key: item.skip for item in open_source(str(tmp_path)).items}
    assert reasons == {
        ".git/": "hidden: the name begins with a dot",
        ".hidden.jpg": "hidden: the name begins with a dot",
        "__MACOSX/": "hidden: a macOS side file",
        "dangling.jpg": "unreadable: No such file or directory",
        "good.jpg": "",
        "label.cls": "not an image: by its name (.cls)",
        "movie.mp4": "not an image: by its name (.mp4)",
        "notes.txt": "not an image: by its name (.txt)",
        "pipe.jpg": "not an image: not a regular file",
    }


def test_links_are_followed_once_and_never_round(tmp_path):
    write(tmp_path / "set", ["real/1.jpg", "other/2.jpg"])
    write(tmp_path / "elsewhere", ["3.jpg"])
    (tmp_path / "set" / "real" / "up").symlink_to("..")
    (tmp_path / "set" / "real" / "self").symlink_to(".")
    (tmp_path / "set" / "a_copy").symlink_to("real")
    (tmp_path / "set" / "outside").symlink_to(tmp_path / "elsewhere")
    keys = [item.key for item in open_source(str(tmp_path / "set")).items]
    assert keys == ["other/2.jpg", "outside/3.jpg", "real/1.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path, ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "b").chmod(0)
    reasons = {item.key: item.skip for item in open_source(str(tmp_path)).items}
    assert reasons["b/"].startswith("unreadable: a folder")


def test_a_name_that_is_no_text_survives(tmp_path):
    write(tmp_path / "set", ["a.jpg"])
    odd = os.fsencode(str(tmp_path / "set")) + b"/\xff\xfe.jpg"
    try:
        with open(odd, "wb") as file:
            file.write(jpeg(7))
    except OSError:
        pytest.skip("this file system wants names that are text")
    with open(os.fsencode(str(tmp_path / "set")) + b"/\xfd.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff broken")
    packed = pack(str(tmp_path / "set"), tmp_path / "cache")
    assert packed.images == 2
    assert os.fsencode(read_names(packed.path)[1]) == b"\xff\xfe.jpg"
    assert b"\xfd.jpg" in packed.rejected.read_bytes()


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        (["set/cat/1.jpg", "set/dog/2.jpg"], ["cat", "dog"]),
        (["cat/tabby/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        (["cat/1.jpg", "dog/2.jpg", "README"], ["cat", "dog", None]),
        (["cat/1.jpg", "2.jpg"], [None, None]),
        (["cat/1.jpg", "cat/2.jpg"], [None, None]),
        (["1.jpg"], [None]),
        ([], []),
    ],
)
def test_labels_from_folders(names, labels):
    assert labels_from_folders(names) == labels


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train/c/1.jpg", "val/c/2.jpg", "test/c/3.jpg"], ["train/c/1.jpg"], ["val/c/2.jpg"]),
        (["s/Train/1.jpg", "s/validation/2.jpg"], ["s/Train/1.jpg"], ["s/validation/2.jpg"]),
        (["train/1.jpg", "test/2.jpg", "extra/3.jpg"], ["train/1.jpg"], ["test/2.jpg"]),
        (["train/1.jpg", "other/2.jpg"], [], []),
        (["training_day/1.jpg", "val/2.jpg"], [], []),
    ],
)
def test_an_existing_division_is_recognised(tmp_path, names, train, val):
    write(tmp_path, names)
    source = open_source(str(tmp_path))
    parts = source.parts()
    assert [source.items[i].key for i in parts.get("train", [])] == train
    assert [source.items[i].key for i in parts.get("val", [])] == val


def test_held_out_images_given_apart_are_never_trained_on(tmp_path):
    write(tmp_path / "set", [f"{part}/{c}/{i}.jpg" for part in ("train", "val") for c in "ab" for i in range(3)])
    train, val, note = open_split(str(tmp_path / "set"), str(tmp_path / "set" / "val"), tmp_path / "cache")
    assert all(name.startswith("train/") for name in read_names(train.path))
    assert (train.images, val.images, train.classes, val.classes) == (6, 6, ("a", "b"), ("a", "b"))
    assert note.startswith("from ")


def test_all_parts_share_one_list_of_classes(tmp_path):
    names = [f"{part}/{c}/{i}.jpg" for part, cs in (("train", "02468"), ("val", "48")) for c in cs for i in range(2)]
    write(tmp_path / "set", [*names, "train/10/0.jpg"])
    train, val, _ = open_split(str(tmp_path / "set"), None, tmp_path / "cache")
    assert train.classes == val.classes == ("0", "2", "4", "6", "8", "10")
    assert BetonReader(val.path).metadata["label"].tolist() == [2, 2, 4, 4]


# ------------------------------------------------------------------------------------------------------ remote places


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket():
    with s3("photos") as files:
        yield files


def fill(files: fsspec.AbstractFileSystem, root: str, tmp_path: Path) -> None:
    """One set of 12 labelled images in every form below a remote root."""
    names = [f"{'cat' if i % 2 else 'dog'}/{i:02}[1].jpg" for i in range(12)]
    contents = write(tmp_path / "set", names)
    for name, content in contents.items():
        files.pipe(f"{root}/set/{name}", content)
    files.pipe(f"{root}/set/notes.txt", b"x")
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        files.pipe(f"{root}/set{suffix}", tar(tmp_path / f"set{suffix}", contents, mode).read_bytes())
    rows = {"image": list(contents.values()), "label": [name[:3] for name in names]}
    pd.DataFrame(rows).to_parquet(tmp_path / "set.parquet")
    files.pipe(f"{root}/set.parquet", (tmp_path / "set.parquet").read_bytes())
    table = "path,label\n" + "".join(f"set/{name},{name[:3]}\n" for name in names)
    files.pipe(f"{root}/set.csv", table.encode())
    whole = pack(str(tmp_path / "set"), tmp_path / "cache")
    files.pipe(f"{root}/set.beton", whole.path.read_bytes())


def test_a_beton_brought_here_is_whole_or_not_there(tmp_path, monkeypatch):
    files, cache = fsspec.filesystem("memory"), tmp_path / "cache"
    write(tmp_path / "set", [f"{i}.jpg" for i in range(4)])
    content = pack(str(tmp_path / "set"), tmp_path / "packed").path.read_bytes()
    files.pipe("/brought/set.beton", content)
    files.pipe("/brought/cut.beton", content[:-5])
    packed = pack("memory://brought/set.beton", cache)
    packed.path.write_bytes(content[:-5])  # its copy here is damaged
    assert pack("memory://brought/set.beton", cache) == packed
    assert packed.path.read_bytes() == content
    with pytest.raises(UserError, match=r"^memory://brought/cut\.beton: .*cut short"):
        pack("memory://brought/cut.beton", cache)
    lost = "memory://brought/new.beton: cannot be fetched"
    for failure, sentence in (
        (OSError(28, "no room"), "the disk is full"),
        (OSError(5, "as it were"), lost),
        (RuntimeError("a storage's own"), lost),
    ):

        def failing(_path, to, failure=failure):
            Path(to).write_bytes(content[:99])
            raise failure

        files.pipe("/brought/new.beton", content)
        monkeypatch.setattr(type(files), "get_file", lambda self, *words, failing=failing: failing(*words))
        with pytest.raises(UserError, match=sentence):
            pack("memory://brought/new.beton", cache)
        assert not list(cache.glob("new*.beton")) + list(cache.glob("*.partial"))


def check_every_form(files: fsspec.AbstractFileSystem, root: str, protocol: str, tmp_path: Path) -> None:
    fill(files, root, tmp_path)
    expected = sorted(jpeg(i) for i in range(12))
    for name in ("set", "set.tar", "set.tar.gz", "set.parquet", "set.csv", "set.beton"):
        packed = pack(f"{protocol}://{root}/{name}", tmp_path / "cache")
        assert sorted(content for content, *_ in BetonReader(packed.path)) == expected, name
        assert packed.classes == (("cat", "dog") if name != "set.beton" else ("0", "1")), name
        assert pack(f"{protocol}://{root}/{name}", tmp_path / "cache") == packed, name
    first = pack(f"{protocol}://{root}/set", tmp_path / "cache")
    files.pipe(f"{root}/set/dog/new.jpg", jpeg(99))
    files.invalidate_cache()
    assert pack(f"{protocol}://{root}/set", tmp_path / "cache").images == first.images + 1
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(f"{protocol}://{root}/nowhere")


def test_every_form_from_memory(memory, tmp_path):
    check_every_form(memory, "/photos", "memory", tmp_path)


def test_every_form_from_s3(bucket, tmp_path):
    check_every_form(bucket, "photos", "s3", tmp_path)


def test_a_place_out_of_reach_is_a_sentence(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://photos/set: cannot be reached"):
        open_source("s3://photos/set")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match="nosuch"):
        open_source("nosuch://photos")


def test_what_fails_to_arrive_is_tried_again_then_told(monkeypatch, memory):
    memory.pipe("/a/1.jpg", b"one")
    memory.pipe("/a/2.jpg", b"two")
    calls = []
    real = type(memory).cat_ranges

    def flaky(self, paths, *arguments, **options):
        calls.append(list(paths))
        results = real(self, paths, *arguments, **options)
        return [TimeoutError("slow") if len(calls) < 3 and p.endswith("2.jpg") else r for p, r in zip(paths, results)]

    monkeypatch.setattr(type(memory), "cat_ranges", flaky)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    paths = [(0, "/a/1.jpg"), (1, "/a/2.jpg"), (2, "/a/gone.jpg")]
    got = dict(remote.fetch(memory, paths))
    assert (got[0], got[1]) == (b"one", b"two")
    assert isinstance(got[2], Unreadable)
    assert [len(paths) for paths in calls] == [3, 1, 1]
    calls[:] = []
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(UserError, match="cannot be fetched"):
        list(remote.fetch(memory, paths))


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("make", "address", "sentence"),
    [
        (lambda p: (p / "photos").mkdir(), "photo", "no such file or folder; did you mean .*photos"),
        (lambda p: (p / "x.jpg").write_bytes(b"x"), "x.jpg", "a single image; give the folder"),
        (lambda p: (p / "x.zip").write_bytes(b"x"), "x.zip", "unzip it first"),
        (
            lambda p: write(p / "s", ["a.txt", "b.csv"]),
            "s",
            r"no image found below it \(looked for .*; 2 files of other",
        ),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, make, address, sentence):
    make(tmp_path)
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path / address))
