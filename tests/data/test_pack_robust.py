"""Packing when things go wrong: damaged caches, locks, full disks, interruptions; and the command line's manners."""

import csv
import fcntl
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.data.beton import BetonReader
from pipeline.data.pack import open_split, pack
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def jpeg(seed: int, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(30):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "photos"


def command(*words: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    program = [sys.executable, "-m", "pipeline.pack", *map(str, words)]
    return subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("damage", ["cut", "absent", "json", "done"])
def test_a_damaged_cache_is_packed_anew(photos, tmp_path, damage):
    whole = pack(str(photos), tmp_path / "cache")
    before = whole.path.read_bytes()
    if damage == "cut":
        os.truncate(whole.path, len(before) - 100)
    elif damage == "absent":
        whole.path.unlink()
    elif damage == "json":
        whole.path.with_suffix(".json").write_text("{")
    else:
        (whole.path.parent / "done.json").write_text("")
    assert pack(str(photos), tmp_path / "cache") == whole
    assert whole.path.read_bytes() == before


def test_the_file_is_the_same_for_any_number_of_workers(photos, tmp_path):
    contents = {pack(str(photos), tmp_path / str(n), workers=n).path.read_bytes() for n in (1, 3)}
    assert len(contents) == 1


def test_a_second_packer_waits_for_a_living_one_and_says_so(photos, tmp_path, caplog):
    pack(str(photos), tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.5, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        started = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert pack(str(photos), tmp_path / "cache").images == 30
        assert time.monotonic() - started >= 0.4
    assert "waiting for it" in caplog.text


def test_the_lock_of_a_dead_process_is_taken_over(photos, tmp_path):
    pack(str(photos), tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob("*.lock")
    hold = f"import fcntl, time; f = open({str(lock)!r}); fcntl.flock(f, 2); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    threading.Timer(0.3, holder.kill).start()
    assert pack(str(photos), tmp_path / "cache").images == 30
    assert holder.wait() == -signal.SIGKILL  # it was not waited for until it ended by itself


def test_too_many_broken_files_are_listed(photos, tmp_path):
    for i in range(50):
        (photos / f"bad{i}.jpg").write_bytes(jpeg(i)[:200])
    with pytest.raises(UserError, match=r"broken \(\d+ truncated\), more than 50% of all 80; see .*rejected\.csv"):
        pack(str(photos), tmp_path / "cache")
    (name,) = left_in(tmp_path / "cache")
    with open(tmp_path / "cache" / name, newline="") as file:
        assert {row["reason"].split(":")[0] for row in csv.DictReader(file)} == {"truncated"}


def test_files_that_never_were_images_do_not_stop_it(photos, tmp_path):
    for i in range(100):
        (photos / f"data{i}").write_bytes(b"words, not pixels " * 9)
        (photos / f"text{i}.txt").write_bytes(b"x")
    packed = pack(str(photos), tmp_path / "cache")
    assert (packed.images, packed.rejected_count) == (30, 200)


def test_one_image_is_trained_on_not_held_out(tmp_path):
    for i in range(60):  # each alone: about one in ten would be held out
        folder = tmp_path / f"set{i}"
        (folder / "a").mkdir(parents=True)
        (folder / "a" / "1.jpg").write_bytes(jpeg(i))
        (folder / "list.csv").write_text("path,label\na/1.jpg,a\n")
        if i % 10 == 0:
            assert open_split(str(folder / "list.csv"), None, tmp_path / "cache").train.images == 1


def test_a_cache_that_cannot_be_used_is_a_sentence(photos, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            pack(str(photos), cache)
    with pytest.raises(UserError, match="--resize needs the images"):
        pack(str(pack(str(photos), tmp_path / "cache").path), tmp_path / "cache", resize=10)


def test_a_disk_that_really_fills_up(tmp_path):
    for i in range(12):
        path = tmp_path / "big" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(i) + os.urandom(400_000))

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))

    process = command("--data", tmp_path / "big", "--cache", tmp_path / "cache", preexec_fn=limit)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 2, error
    assert "the disk is full" in error
    assert "Traceback" not in error
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, None)])
def test_an_interruption_leaves_no_processes_and_no_broken_cache(tmp_path, number, status):
    for i in range(150):
        path = tmp_path / "big" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (300, 300, 3), np.uint8)).save(path, compress_level=1)
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 - a shell's background ignores Ctrl-C
    process = command("--data", tmp_path / "big", "--cache", tmp_path / "cache", preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*/.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (status or -number)
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    if number == signal.SIGINT:
        assert left_in(tmp_path / "cache") == []
    assert len(BetonReader(pack(str(tmp_path / "big"), tmp_path / "cache").path)) == 150
    assert not [name for name in left_in(tmp_path / "cache") if name.endswith("partial")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "/nowhere/photos"], "error: /nowhere/photos: no such file or folder"),
        (["--dta", "x"], "--data"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, sentence):
    process = command(*words)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert sentence in error
    assert "Traceback" not in error


def test_help_and_mistakes_need_no_torch(tmp_path):
    code = (
        "import sys, pipeline.pack as p\n"
        "try: p.main(['--help'])\nexcept SystemExit: pass\n"
        f"assert p.main(['--data', {str(tmp_path / 'absent')!r}]) == 2\n"
        "print([m for m in ('torch', 'ffcv', 'ray', 'mlflow', 'timm') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--max-rejected" in done.stdout
