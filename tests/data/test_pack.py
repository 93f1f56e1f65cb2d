"""Packing: every kind of source, once, safely, and what each nasty file is expected to do."""

import csv
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import pack as command
from pipeline.data import pack as packing
from pipeline.data import parts
from pipeline.data.beton import BetonReader
from pipeline.data.pack import open_split
from pipeline.data.packed import read_facts, read_names
from pipeline.errors import UserError


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 3, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return path.read_bytes()


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(40):
        draw(tmp_path / "photos" / f"class{i % 2}" / f"{i}.jpg", i)
    return tmp_path / "photos"


def test_a_folder_keeps_its_jpeg_bytes_and_labels(photos, tmp_path):
    train, val, note = open_split(str(photos), None, tmp_path / "cache")
    assert "held out" in note
    assert train.images + val.images == 40
    assert train.classes == val.classes == ("class0", "class1")
    reader = BetonReader(train.path)
    for i, name in enumerate(read_names(train.path)):
        content, height, width, label = reader.read(i)
        assert content == (photos / name).read_bytes()
        assert (height, width) == (30, 40)
        assert train.classes[label] == name.split("/")[0]


def test_the_second_time_nothing_is_decoded(photos, tmp_path, monkeypatch):
    first = open_split(str(photos), None, tmp_path / "cache")
    monkeypatch.setattr(parts, "Decoders", None)
    assert open_split(str(photos), None, tmp_path / "cache") == first
    draw(photos / "class0" / "new.jpg", 99)
    with pytest.raises(TypeError):
        open_split(str(photos), None, tmp_path / "cache")


def test_an_existing_division_is_taken(tmp_path):
    for part, count in (("train", 6), ("val", 4)):
        for i in range(count):
            draw(tmp_path / "set" / part / f"c{i % 2}" / f"{i}.jpg", hash((part, i)) % 1000)
    train, val, note = open_split(str(tmp_path / "set"), None, tmp_path / "cache")
    assert (train.images, val.images) == (6, 4)
    assert note == "its own validation part"
    assert train.classes == ("c0", "c1")


def test_copies_of_an_image_never_lie_on_both_sides(tmp_path):
    for i in range(30):
        content = draw(tmp_path / "set" / "a" / f"{i}.jpg", i)
        (tmp_path / "set" / "b").mkdir(exist_ok=True)
        (tmp_path / "set" / "b" / f"{i}.jpg").write_bytes(content)
    train, val, _ = open_split(str(tmp_path / "set"), None, tmp_path / "cache")

    def contents(packed):
        reader = BetonReader(packed.path)
        return {hashlib.sha256(reader.read(i)[0]).digest() for i in range(len(reader))}

    assert not contents(train) & contents(val)
    assert read_facts(train.path)["duplicates"] == train.images // 2


def test_images_without_labels_are_all_trained_on(tmp_path):
    for i in range(5):
        draw(tmp_path / "flat" / f"{i}.jpg", i)
    train, val, note = open_split(str(tmp_path / "flat"), None, tmp_path / "cache")
    assert (train.images, val, note) == (5, None, "nothing held out")


def test_tar_parquet_and_csv_hold_the_same_images(photos, tmp_path):
    paths = sorted(photos.rglob("*.jpg"))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    rows = [{"image": {"bytes": p.read_bytes(), "path": p.name}, "label": p.parent.name} for p in paths]
    pd.DataFrame(rows).to_parquet(tmp_path / "photos.parquet")
    pd.DataFrame({"path": [str(p) for p in paths], "label": [p.parent.name for p in paths]}).to_csv(
        tmp_path / "photos.csv", index=False
    )
    counts = set()
    for name in ("photos", "photos.tar", "photos.parquet", "photos.csv"):
        train, val, _ = open_split(str(tmp_path / name), None, tmp_path / "cache")
        counts.add((train.images, val.images, train.classes))
    assert len(counts) == 1


def test_a_limit_is_kept_and_always_the_same(photos, tmp_path):
    one = open_split(str(photos), None, tmp_path / "a", limit=10).train
    two = open_split(str(photos), None, tmp_path / "b", limit=10).train
    assert one.images == 10
    assert one.fingerprint == two.fingerprint


def test_a_beton_is_split_and_taken_as_it_is(photos, tmp_path):
    whole = packing.pack(str(photos), tmp_path / "cache")
    assert whole.images == 40
    train, val, _ = open_split(str(whole.path), None, tmp_path / "cache")
    assert train.images + val.images == 40
    assert train.classes == whole.classes


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "no image found"),
        (lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")), "no image found"),
        (lambda p: p.write_text("x"), "no source of images"),
    ],
)
def test_nothing_to_pack_is_a_sentence(make, sentence, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=sentence):
        open_split(str(tmp_path / "data"), None, tmp_path / "cache")


def test_a_source_that_is_mostly_broken_stops_and_says_why(tmp_path):
    for i in range(3):
        draw(tmp_path / "set" / f"{i}.jpg", i)
    for i in range(9):
        (tmp_path / "set" / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"junk" * 50)
    with pytest.raises(UserError, match="files are broken"):
        open_split(str(tmp_path / "set"), None, tmp_path / "cache")
    train = open_split(str(tmp_path / "set"), None, tmp_path / "cache", max_rejected=1.0).train
    assert (train.images, train.rejected_count) == (3, 9)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.data.beton.BetonWriter.write", full)
    with pytest.raises(UserError, match="the disk is full"):
        open_split(str(photos), None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*"))


def _pack_in_a_process(photos: str, cache: str, results) -> None:
    results.put(open_split(photos, None, cache).train.fingerprint)


def test_two_at_once_give_one_right_result(photos, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [
        context.Process(target=_pack_in_a_process, args=(str(photos), str(tmp_path / "cache"), results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    fingerprints = {results.get(timeout=120) for _ in both}
    for process in both:
        process.join()
    assert len(fingerprints) == 1
    assert len(list((tmp_path / "cache").glob("*/train.beton"))) == 1


def test_packing_killed_in_the_middle_starts_again(tmp_path):
    for i in range(400):
        draw(tmp_path / "set" / "ab"[i % 2] / f"{i}.jpg", i, size=(600, 500))
    words = [sys.executable, "-m", "pipeline.pack", "--data", str(tmp_path / "set"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*/.train*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train, val, _ = open_split(str(tmp_path / "set"), None, tmp_path / "cache")
    assert train.images + val.images == 400
    assert not list((tmp_path / "cache").glob("*/.*partial"))


def test_the_command_reports_what_it_found(photos, tmp_path, capsys):
    (photos / "class0" / "cut.jpg").write_bytes((photos / "class0" / "0.jpg").read_bytes()[:300])
    assert command.main(["--data", str(photos), "--cache", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert "2 classes" in said
    assert "1 files" in said
    assert command.main(["--data", str(tmp_path / "nowhere")]) == 2


def test_every_nasty_file_does_what_is_expected(shared_data, tmp_path):
    folder = shared_data("nasty_images")
    with open(folder / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        manifest = list(csv.DictReader(file))
    train = packing.pack(str(folder), tmp_path / "cache", max_rejected=1.0)
    names = read_names(train.path)
    with train.rejected.open(newline="", encoding="utf-8") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert all(rejected.values())
    hidden = {row["file"] for row in manifest if Path(row["file"]).name.startswith(".")}
    for row in manifest:
        decoded = row["file"] in names
        if row["expected"] == "decode":
            assert decoded, (row["file"], rejected.get(row["file"]))
        elif row["expected"] == "reject":
            assert not decoded, row["file"]
            assert row["file"] in rejected or row["file"] in hidden
        else:
            assert decoded != (row["file"] in rejected), row["file"]

    import cv2

    reader = BetonReader(train.path)

    def pixels(name: str) -> np.ndarray:
        content, *_ = reader.read(names.index(name))
        if isinstance(content, bytes):
            content = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        return content.astype(float)

    upright = pixels("jpeg/rgb_128.jpg")
    for i in range(2, 9):
        assert np.abs(pixels(f"exif/orientation_{i}.jpg") - upright).mean() < 6
    ramp = pixels("mode/I16_gradient.png")[..., 0]
    steps = np.diff(ramp.mean(0) if np.ptp(ramp.mean(0)) > np.ptp(ramp.mean(1)) else ramp.mean(1))
    assert np.ptp(ramp) > 240
    assert np.abs(steps).max() <= 8
