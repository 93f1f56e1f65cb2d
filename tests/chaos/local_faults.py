"""Faults of one process and its disk. Each function does one, asserts what must hold then, and says what it cost."""

import ctypes
import os
import random
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from pipeline import pretrain, replay
from pipeline.training import step, worker
from pipeline.training.health import Care, Health
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import RunFolder
from tests.chaos.runs import (
    BATCH,
    Place,
    Row,
    assert_same_run,
    assert_tracked,
    assert_tracked_since,
    final,
    losses,
    steps,
)
from tests.s3 import Server, s3

EPOCHS = ("--epochs", "12")


def killed_at_random(place: Place, trials: int = 5, seed: int = 0) -> Row:
    """SIGKILL again and again, at random moments of start, training and writing, until the run is through."""
    whole = place.whole("whole", *EPOCHS)
    draw, worst, seconds, kills = random.Random(seed), 0, 0.0, 0
    for trial in range(trials):
        name = f"killed{trial}"
        run = place.folder / "runs" / name
        while True:
            process = place.start(name, *EPOCHS, "--checkpoint-every", "0.002")
            reach = draw.randint(1, 60)  # steps of this life
            begun = _seen(run)
            while process.poll() is None and _seen(run) < begun + reach * BATCH:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            if process.poll() is None and kills < 3 * (trial + 1):
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                kept = RunFolder(str(run)).checkpoints()
                worst = max(worst, _seen(run) - (kept[-1] if kept else 0))
                killed = time.monotonic()
                continue
            assert process.wait(600) == 0, place.log(name)[-2000:]
            seconds = max(seconds, time.monotonic() - killed)
            break
        assert_same_run(whole, run)
        assert_tracked(run, place.folder / "runs" / "mlflow.db")
        assert not list(run.glob("**/.writing-*"))
    return Row(
        f"killed {kills} times in {trials} runs", "SIGKILL at random moments", worst, None,
        "nothing; the same command again: (continued at … images)",
    )  # fmt: skip


def killed_while_writing(place: Place) -> Row:
    """SIGKILL while a checkpoint is half written: the process is held as a file shows, until one is unfinished."""
    words = (*EPOCHS, "--options.hidden-dim", "512")
    whole, run = place.whole("whole", *words), place.folder / "runs" / "torn"
    process = place.start("torn", *words, "--checkpoint-every", "0.0001")
    while not (unfinished := _unfinished(run)):
        process.send_signal(signal.SIGCONT)
        _until(lambda: _unfinished(run) and RunFolder(str(run)).checkpoints(), process)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _unfinished(run) == unfinished
    lost = _seen(run) - RunFolder(str(run)).checkpoints()[-1]
    again = time.monotonic()
    assert place.start("torn", *words).wait(600) == 0, place.log("torn")[-2000:]
    assert_same_run(whole, run)
    assert not list(run.glob("**/.writing-*"))
    return Row("killed while writing a checkpoint", "SIGKILL before the file is whole", lost, time.monotonic() - again,
               "nothing; the same command again continues")  # fmt: skip


def _unfinished(run: Path) -> list[Path]:
    """Files of checkpoints that are begun and not yet whole: a zip archive's table of contents comes last."""
    begun = (run / "checkpoints").glob(".writing-*")
    return [path for path in begun if path.exists() and path.read_bytes()[:2] == b"PK" and not zipfile.is_zipfile(path)]


def bit(place: Place) -> Row:
    """One bit of the newest checkpoint is turned."""
    return _damaged(place, "bit")


def torn(place: Place) -> Row:
    """The newest checkpoint is cut short."""
    return _damaged(place, "torn")


def _damaged(place: Place, how: str) -> Row:
    whole, run = place.whole("whole", *EPOCHS), place.folder / "runs" / how
    process = place.start(how, *EPOCHS, "--checkpoint-every", "0.0005")
    _until(lambda: len(RunFolder(str(run)).checkpoints()) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = RunFolder(str(run))
    older, newest = folder.checkpoints()[-2:]
    path = run / "checkpoints" / f"{newest:012d}.pt"
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 16
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    again = time.monotonic()
    assert place.start(how, *EPOCHS).wait(600) == 0, place.log(how)[-2000:]
    said = next(line for line in place.log(how).splitlines() if "damaged" in line)
    assert f"checkpoint {newest}" in said
    assert path.with_suffix(".pt.damaged").exists()
    assert_same_run(whole, run)
    return Row(f"newest checkpoint damaged ({how})", "one bit turned" if how == "bit" else "cut in half",
               newest - older, time.monotonic() - again, said)  # fmt: skip


def object_store(place: Place) -> Row:
    """A run whose folder is on S3 is killed, its newest checkpoint damaged there, and it is continued."""
    whole = place.whole("whole", *EPOCHS)
    with s3("runs") as files:
        run = RunFolder("s3://runs/remote")
        process = place.start("s3://runs/remote", *EPOCHS, "--checkpoint-every", "0.0005")
        _until(lambda: len(run.checkpoints()) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        older, newest = run.checkpoints()[-2:]
        key = f"runs/remote/checkpoints/{newest:012d}.pt"
        content = bytearray(files.cat_file(key))
        content[len(content) // 2] ^= 1
        files.pipe_file(key, bytes(content))
        again = time.monotonic()
        assert place.start("s3://runs/remote", *EPOCHS).wait(600) == 0, place.log("remote")[-2000:]
        said = next(line for line in place.log("remote").splitlines() if "damaged" in line)
        assert f"checkpoint {newest}" in said
        assert_same_run(whole, run)
        assert run.exists("summary.json")
        return Row("killed, and a checkpoint on S3 damaged", "SIGKILL, one bit of the object turned", newest - older,
                   time.monotonic() - again, said)  # fmt: skip


def object_store_away(place: Place) -> Row:
    """The S3 server that holds the run folder stops while it trains, and comes back."""
    server = Server()
    with s3("runs", server=server):
        run = RunFolder("s3://runs/away")
        process = place.start("s3://runs/away", "--epochs", "100000", "--checkpoint-every", "0.002")
        _until(lambda: run.checkpoints(), process)
        server.stop()
        gone = time.monotonic()
        _until(lambda: "no checkpoint could be written" in place.log("away"), process)
        _until(lambda: "what was recorded could not be written" in place.log("away"), process)
        server.start()
        seconds = time.monotonic() - gone
        reached = run.checkpoints()[-1]
        _until(lambda: "checkpoints can be written again" in place.log("away"), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, place.log("away")[-2000:]
        seen = [n for n, _ in losses(run)]
        assert seen == list(range(BATCH, seen[-1] + 1, BATCH))
        assert run.checkpoints()[-1] == seen[-1] > reached
        said = [line for line in place.log("away").splitlines() if "written" in line]
        injected = f"the S3 server stopped for {seconds:.0f} s"
        return Row("the storage of the run is away", injected, 0, None, "\n".join(said))


def full_disk(place: Place) -> Row:
    """The disk of the run folder fills up while it trains; later there is room again. Needs root, for a small tmpfs."""
    disk = place.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(disk)], check=True)
    try:
        run = disk / "run"
        long = ("--epochs", "100000", "--checkpoint-every", "0.002", "--run", str(run))
        process = place.start("full", *long)
        folder = RunFolder(str(run))
        _until(lambda: len(folder.checkpoints()) >= 2, process)
        with open(disk / "ballast", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        _until(lambda: "no checkpoint could be written" in place.log("full"), process)
        reached = folder.checkpoints()[-1]
        said = next(line for line in place.log("full").splitlines() if "no checkpoint could be written" in line)
        assert "training goes on" in said
        assert folder.load_checkpoint(reached)["images_seen"] == reached
        (disk / "ballast").unlink()
        _until(lambda: folder.checkpoints()[-1] > reached, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, place.log("full")[-2000:]
        seen = [n for n, _ in losses(run)]
        assert seen == list(range(BATCH, seen[-1] + 1, BATCH))
        assert folder.checkpoints()[-1] == seen[-1]
        return Row("disk full", "a tmpfs filled to the last byte, then emptied", 0, None, said)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def not_a_number(place: Place) -> Row:
    """One batch gives a loss that is NaN: it is left out, the rest of the run is as it was until there."""
    return _left_out(place, "a loss that is NaN", "one batch's loss multiplied by NaN", poisoned)


def infinite(place: Place) -> Row:
    """One batch gives an infinite loss, likewise."""
    return _left_out(place, "an infinite loss", "one batch's loss multiplied by infinity",
                     lambda when: poisoned(when, float("inf")))  # fmt: skip


def gradient_not_a_number(place: Place) -> Row:
    """One batch gives a gradient that is NaN, though its loss is none, likewise."""
    return _left_out(place, "a gradient that is NaN", "one step's gradient multiplied by NaN",
                     lambda when: thrown(when, float("nan")))  # fmt: skip


def _left_out(place: Place, fault: str, injected: str, inject: Callable) -> Row:
    whole, run = place.train("whole", *EPOCHS), place.folder / "runs" / "ill"
    with inject(lambda progress: abs(progress - 0.5) < 1e-9):
        assert pretrain.main(place.words("ill", *EPOCHS)) == 0
        before, after = dict(losses(whole)), losses(run)
        ill = next(n for n, loss in after if loss is None)
        assert [n for n, _ in after] == list(before)
        assert all(loss == before[n] for n, loss in after if n < ill)
        bundle = next((run / "bundles").glob("nonfinite-*-skip.pt"))
        assert replay.main([str(bundle)]) == 0  # the same fault, the same illness
    assert replay.main([str(bundle)]) == 3  # without it the batch is well
    return Row(fault, injected, ill - BATCH, None, _intervened(run))


def never_a_number(place: Place) -> Row:
    """From the middle on every loss is NaN: everything is tried, then the run stops, with all kept."""
    whole, run, saved = place.train("whole", *EPOCHS), place.folder / "runs" / "diverged", 16 * BATCH
    # Asked before a step's place is recorded, and after.
    due = mock.patch.object(Recorder, "checkpoint_due", lambda self: self.status.seen in (saved - BATCH, saved))
    with due, poisoned(lambda progress: progress >= 0.5):
        assert pretrain.main(place.words("diverged", *EPOCHS)) == 1
        bundles = sorted((run / "bundles").iterdir())
        assert [bundle.stem.split("-")[-1] for bundle in bundles] == ["skip", "end", "lr"]
        assert [replay.main([str(bundle)]) for bundle in bundles] == [0, 0, 0]
    assert final(run)["images_seen"] == saved
    assert losses(run)[:16] == losses(whole)[:16]
    assert [one.change for one in Care.read(RunFolder(str(run))).done] == ["skip", "lr"]
    return Row("a loss that stays NaN", "every loss from the middle on multiplied by NaN", 0, None,
               f"{_intervened(run)} … then: failed, exit 1")  # fmt: skip


def loss_spike(place: Place) -> Row:
    """One step throws the weights far away: the loss leaps, the run goes back and leaves that batch out."""
    run = place.folder / "runs" / "spike"
    mae = (
        "--backbone",
        "lenet5",
        "--objective",
        "mae",
        "--options.decoder-width",
        "16",
        "--options.decoder-depth",
        "1",
    )
    words = place.words("spike", "--optimiser", "sgd", "--lr", "0.01", "--clip", "0", "--epochs", "24",
                        kind=(*mae, "--options.decoder-width", "16", "--options.decoder-heads", "2"))  # fmt: skip
    with thrown(lambda progress: 0.6 <= progress < 0.6 + BATCH / 1152):
        assert pretrain.main(words) == 0
        for bundle in (run / "bundles").iterdir():
            assert replay.main([str(bundle)]) == 0
    rows = losses(run)
    left_out = [n for n, loss in rows if loss is None]
    assert left_out
    assert [n for n, _ in rows] == list(range(BATCH, rows[-1][0] + 1, BATCH))
    kept = [loss for _, loss in rows if loss is not None]
    assert max(kept[-20:]) < 2 * min(kept)
    assert_tracked_since(run, place.folder / "runs" / "mlflow.db")
    return Row("a leap of the loss", "one step's gradient times 1e4", left_out[-1], None, _intervened(run))


def collapse(place: Place) -> Row:
    """A step saturates every unit of the backbone, which then gives all images one feature, and a falling loss: the run
    goes back to a checkpoint from before, though later ones were written, and on with half the learning rate."""
    run, at = place.folder / "runs" / "collapse", []

    def saturate(objective):
        def after_backward(progress):
            if progress >= 0.35 and not at:
                at.append(progress)
                for name, parameter in objective.backbone.named_parameters():
                    if name.endswith("bias"):
                        parameter.data.fill_(-1e3)

        objective.after_backward = after_backward

    kind = ("--backbone", "lenet5", "--objective", "simsiam", "--options.hidden-dim", "32", "--options.out-dim", "32",
            "--options.predictor-dim", "8")  # fmt: skip
    words = place.words("collapse", "--epochs", "36", "--checkpoint-every", "0.01", "--keep", "100", kind=kind)
    with _built(saturate):
        assert pretrain.main(words) == 0
        fell = round(at.pop() * steps(run)[-1]["images"] / BATCH) * BATCH
        (bundle,) = (run / "bundles").iterdir()
        assert replay.main([str(bundle)]) == 0
    rows = steps(run)
    done = Care.read(RunFolder(str(run))).done
    assert [(one.cause, one.change) for one in done] == [("collapse", "lr")]
    assert done[0].back <= fell
    assert [row["images"] for row in rows] == list(range(BATCH, rows[-1]["images"] + 1, BATCH))
    assert min(row["feature_spread"] for row in rows[len(rows) // 2 :]) > 0.02
    assert_tracked_since(run, place.folder / "runs" / "mlflow.db")
    return Row("a collapse", "all biases of the backbone at -1,000", done[0].until - done[0].back, None, done[0].line())


def collapse_already_begun(place: Place) -> Row:
    """A collapse begins between two checkpoints and shows after the second, which holds it already: the run goes back
    there, collapses again, and then to the first."""
    run, at, saved = place.folder / "runs" / "begun", [], (52 * BATCH, 60 * BATCH)

    def sicken(objective):
        objective.register_buffer("ill", torch.zeros(()))

        def after_backward(progress):
            if objective.ill > 0 or (progress >= 55 / 120 - 1e-9 and not at):
                at.append(progress)
                objective.ill += 1

        def show(module, arguments, output):
            loss, scalars = output
            return loss, {**scalars, "feature_spread": scalars["feature_spread"] * (objective.ill < 10)}

        objective.after_backward = after_backward
        objective.register_forward_hook(show)

    soon = mock.patch.object(worker, "Health", partial(Health, collapsed=20))
    # Asked before a step's place is recorded, and after.
    due = mock.patch.object(
        Recorder, "checkpoint_due", lambda self: self.status.seen in (*saved, *(n - BATCH for n in saved))
    )
    words = place.words("begun", "--epochs", "20", "--keep", "100")
    with soon, due, _built(sicken):
        assert pretrain.main(words) == 0
    done = Care.read(RunFolder(str(run))).done
    assert [(one.cause, one.change, one.back) for one in done] == [
        ("collapse", "lr", saved[1]), ("collapse", "lr", saved[0])
    ]  # fmt: skip
    rows = steps(run)
    assert [row["images"] for row in rows] == list(range(BATCH, 120 * BATCH + 1, BATCH))
    assert min(row["feature_spread"] for row in rows) > 0
    said = Care(done).said()
    assert "back to 416 images, one checkpoint further than before, and the learning rate is halved" in said
    return Row("a collapse that a checkpoint holds already", "a vital sign at 0, ten steps after its cause",
               done[1].until - done[1].back, None, said)  # fmt: skip


def loader_dies(place: Place, times: int = 2) -> Row:
    """The thread that loads dies in the middle of a run, and the one that takes its place: no loss is another."""
    shot: list[threading.Thread] = []
    said: list[str] = []

    def shoot(module, arguments):
        for thread in threading.enumerate():
            if thread.name == "prefetch" and arguments[1] >= 0.3 and len(shot) < times and thread not in shot:
                kill = ctypes.pythonapi.PyThreadState_SetAsyncExc
                assert kill(ctypes.c_ulong(thread.ident), ctypes.py_object(ThreadKilled)) == 1
                shot.append(thread)

    def hear(status):
        said.extend(line for line in status.messages if "loader" in line)
        status.messages.clear()
        return False

    whole = place.train("whole", *EPOCHS)
    with _built(lambda objective: objective.register_forward_pre_hook(shoot)):
        run = place.train("loader", *EPOCHS, exchange=hear)
    assert not any(thread.is_alive() for thread in shot)
    assert len(said) == times
    assert_same_run(whole, run)
    return Row("a loader that dies", f"an exception from outside ends its thread, {times} times", 0, None, said[0])


class ThreadKilled(Exception):
    """What ends a thread wherever it is."""


FAULTS = (
    killed_at_random,
    killed_while_writing,
    bit,
    torn,
    object_store,
    object_store_away,
    full_disk,
    not_a_number,
    infinite,
    gradient_not_a_number,
    never_a_number,
    loss_spike,
    collapse,
    collapse_already_begun,
    loader_dies,
)


@contextmanager
def poisoned(when: Callable[[float], bool], factor: float = float("nan")):
    """Objectives whose loss is NaN, or `factor` times what it is, where `when(progress)`."""

    def poison(module, arguments, output):
        loss, scalars = output
        return (loss * factor, scalars) if when(arguments[1]) else output

    with _built(lambda objective: objective.register_forward_hook(poison)):
        yield


@contextmanager
def thrown(when: Callable[[float], bool], factor: float = 1e4):
    """Objectives whose gradients are ten thousand times too large, or `factor` times, where `when(progress)`."""

    def throw(objective):
        def after_backward(progress):
            for parameter in objective.parameters():
                if when(progress) and parameter.grad is not None:
                    parameter.grad.mul_(factor)

        objective.after_backward = after_backward

    with _built(throw):
        yield


@contextmanager
def _built(change: Callable):
    build = step.build

    def changed(config):
        objective = build(config)
        change(objective)
        return objective

    with mock.patch.object(step, "build", changed):
        yield


def _intervened(run: Path) -> str:
    return Care.read(RunFolder(str(run))).done[0].line()


def _seen(run: Path) -> int:
    """Images seen at the last whole line of a run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    whole = [line for line in lines if line.endswith("}")]
    return int(whole[-1].split(",")[0].split(":")[1]) if whole else 0


def _until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
