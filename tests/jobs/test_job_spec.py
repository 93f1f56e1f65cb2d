"""Job files: what they say, and that a mistake in one is named by file, line and way out."""

import importlib
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from job_toys import ROOT, python

from jobs import spec
from jobs.entry_points import entry_points
from jobs.firing import which_firing
from jobs.job import Job, Resources, Retry, cell_name
from pipeline.arguments import read
from pipeline.errors import UserError

GOOD = """\
run: pretrain
arguments:
  data: embedded
  epochs: 2
  options:
    out_dim: 64
matrix:
  backbone: [lenet5, vit_ti8]
  objective: [dino]
schedule:
  cron: 15 1 * * *
  time_zone: Europe/Berlin
workers: 2
resources: {cpus: 4, memory: 8GiB}
environment: {NCCL_DEBUG: WARN}
secrets: [MLFLOW_TRACKING_TOKEN]
time_limit: 8h
retry: {times: 2, wait: 5m}
after:
  - run: evaluate
    arguments: {run: "{run}", data: embedded, protocols: [knn, linear]}
notify:
  webhook: $WEBHOOK
  command: logger "$JOB_TEXT"
  on: [finish, collapse]
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, *settings: str, name: str = "night.yaml", **options) -> Job:
        Path(name).write_text(text)
        return spec.load(name, settings, **options)

    return write


def test_all_of_a_job_file_is_read(job):
    read = job(GOOD)
    assert [cell.name for cell in read.cells] == ["lenet5-dino", "vit_ti8-dino"]
    assert read.of(read.cells[1]).command() == [
        "-m", "pipeline.pretrain", "--workers", "2", "--data", "embedded", "--epochs", "2", "--options.out-dim", "64",
        "--backbone", "vit_ti8", "--objective", "dino",
    ]  # fmt: skip
    assert read.time_limit == 8 * 3600
    assert read.retry == Retry(2, 300)
    assert read.step.resources == Resources(4, 0, 8 << 30)
    assert read.timetable.overlap == "skip"
    assert read.after[0].command("runs/x") == [
        "-m", "pipeline.evaluate", "runs/x", "--data", "embedded", "--protocols", "knn", "linear",
    ]  # fmt: skip
    assert not read.after[0].once
    assert read.notify.on == ("finish", "collapse")


MISTAKES = [
    ("epochs: 2", "epoch: 2", 4, "epoch: no such option; did you mean --epochs"),
    ("epochs: 2", "epochs: 0", 4, "epochs 0: must be at least 1"),
    ("epochs: 2", "epochs: two", 4, "epochs two: is no value for it"),
    ("data: embedded\n  e", "data: nowhere/photos\n  e", 3,
     "data nowhere/photos: no such file or folder here; .*data_on: cluster"),
    ("out_dim: 64", "outdim: 64", 6, "options.outdim: no such option; did you mean --options.out-dim"),
    ("[lenet5, vit_ti8]", "[lenet5, resnet81]", 8, "backbone 'resnet81' is not known: did you mean .*resnet18"),
    ("[lenet5, vit_ti8]", "[lenet5, lenet5]", 8, "matrix backbone: lenet5 is given twice"),
    ("[lenet5, vit_ti8]", "lenet5", 8, "matrix backbone: must be a list of values"),
    ("objective: [dino]", "objective: [din0]", 9, "objective 'din0' is not known; did you mean dino"),
    ("objective: [dino]", "epochs: [1, 2]", 9, "epochs is set under arguments too"),
    ("objective: [dino]", f"seed: {list(range(5000))}", 7,
     "a matrix of 2 × 5000 = 10,000 cells is more than 100; split it"),
    ("15 1 * * *", "15 25 * * *", 11, "cron line '15 25 .*' hour '25' is not within 0 to 23"),
    ("cron: 15 1 * * *", "at: noon", 11, "unknown key 'at'; there are cron"),
    ("Europe/Berlin", "Europe/Berln", 12, "time_zone 'Europe/Berln': unknown; did you mean Europe/Berlin"),
    ("  time_zone: Europe/Berlin\n", "", 10, "a schedule needs a time_zone"),
    ("  cron: 15 1 * * *\n", "", 10, "a schedule needs a cron line"),
    ("workers: 2", "worker: 2", 13, "unknown key 'worker'; did you mean workers"),
    ("workers: 2", "workers: 1.5", 13, "workers 1.5: must be a whole number"),
    ("workers: 2", "workers: 8..2", 13, "workers '8..2': must be a whole number, at least 1, or two as in 2..8"),
    ("cpus: 4", "cpus: 0.5", 14, "cpus 0.5: a worker has whole cores, at least 1"),
    ("cpus: 4", "gpus: 2", 14, "gpus 2: a worker has one GPU; give more workers"),
    ("8GiB", "8 gigs", 14, "memory '8 gigs': must be a size such as"),
    ("NCCL_DEBUG: WARN", "API_TOKEN: a1b2c3", 15, "API_TOKEN looks like a secret; name its variable under secrets"),
    ("data: embedded\n  e", "data: s3://me:pass@bucket/photos\n  e", 3, "data looks like a secret"),
    ("[MLFLOW_TRACKING_TOKEN]", "{MLFLOW_TRACKING_TOKEN: x}", 16, "secrets must be a list of names"),
    ("8h", "8 hours", 17, "time_limit '8 hours': must be a time such as 90s, 30m, 8h or 2d"),
    ("times: 2", "tries: 2", 18, "unknown key 'tries'; did you mean times"),
    ("run: evaluate", "run: evalute", 20, "run 'evalute': no such entry point; did you mean evaluate"),
    ("protocols:", "protocol:", 21, "evaluate has no option 'protocol'; did you mean protocols"),
    ('run: "{run}", ', "", 21, "evaluate needs the argument run"),
    ("$WEBHOOK", "hooks.example.org/x", 23, "webhook .* must be an http"),
    ("[finish, collapse]", "[finished]", 25, "event 'finished': unknown; did you mean finish"),
    ("time_limit: 8h", "time_limit: 8h\ntime_limit: 9h", 18, "time_limit is given twice, in lines 17 and 18; keep one"),
    ("epochs: 2", "epochs: [", 6, "is not YAML"),
    ("15 1 * * *", "*/15 * * * *", 11, "is not YAML: .*; put what begins with . in quotes"),
    ("epochs: 2", "run: runs/mine", 4, "run is the job's own"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "line", "said"), MISTAKES, ids=[m[3][:30] for m in MISTAKES])
def test_a_mistake_is_named_by_file_line_and_way_out(job, right, wrong, line, said):
    assert GOOD.count(right) == 1
    with pytest.raises(UserError, match=rf"^night\.yaml:{line}: {said}") as caught:
        job(GOOD.replace(right, wrong))
    assert "\n" not in str(caught.value)


PLAIN = "run: pretrain\narguments:\n  data: embedded\n"
AFTER = f"{PLAIN}after:\n  - run: evaluate\n    arguments:\n      run: "
FILES = [
    ("", 1, "run is missing; there are .*pretrain"),
    ("hello", 1, "the file must be a mapping of run, .*, as in run: …"),
    ("run:pretrain", 1, "the file must be a mapping of run, "),
    (b"\x89PNG\r\n\x1a\n\xff", 1, "is no text in UTF-8; save it as that"),
    ("run: pretrain\n# f\xfcr\n".encode("latin1"), 2, "is no text in UTF-8"),
    (f"{PLAIN}notify: {{command: 'a\0b'}}\n", 4, r"holds the character '\\x00'; delete it"),
    ("run: pretrain\narguments:\n\tdata: embedded\n", 3, "is not YAML: .*; indent with spaces, and put one"),
    ('run: pretrain\narguments:\n  data: "x\n', 4, "is not YAML: .* unexpected end of stream; it began in line 3"),
    (f"{PLAIN}---\n{PLAIN}", 4, "is not YAML: expected a single document in the stream, but found another"),
    ("run: pretrain\narguments: &all\n  data: *all\n", 2, "data holds itself, .*; write it out"),
    (f"{PLAIN}after: &all [*all]\n", 4, "entry 1 of after holds itself"),
    ("run: !!python/object/apply:os.system [id]", 1, "is not YAML: could not determine a constructor"),
    (f"{PLAIN}  3: 4\n", 4, "the key 3 is no word; keys are, as in run: pretrain"),
    (f"{PLAIN}  --epochs: 4\n", 4, "--epochs: write epochs, without the dashes of the command line"),
    (f"{PLAIN}  lr: 1\n  batch-size: 8\n  batch_size: 16\n", 6, "batch_size is given twice, spelt in two ways"),
    ("run: [pretrain]", 1, r"run \['pretrain'\]: no such entry point; did you mean pretrain"),
    ("run: pretrain\narguments:\n  data:\n", 3, "data has no value; give it one, or leave it out"),
    ("run: pretrain\narguments: {data:photos}\n", 2, "data:photos has no value"),
    ("run: pretrain\narguments:\n  data: [a, b]\n", 3, r"data \['a', 'b'\]: is one value; several go under matrix"),
    ("run: pretrain\narguments:\n  data: 5\n", 3, "data 5: no such file or folder here"),
    (f"{PLAIN}  objective: [dino, mae]\n", 4, r"objective \['dino', 'mae'\]: is one value; several go under matrix"),
    (f"{PLAIN}  seed: 1\n  compile: maybe\n", 5, "compile maybe: is no value for it; python -m pipeline.pretrain"),
    (f"{PLAIN}  epochs: [1, 2]\n", 4, r"epochs \[1, 2\]: is no value for it"),
    (f"{PLAIN}  help: true\n", 4, "help: no such option"),
    (f"{PLAIN}secrets: [~]\n", 4, "secrets must be a list of names"),
    (f"{PLAIN}time_limit: 0s\n", 4, "time_limit '0s': must be a time such as"),
    (f"{PLAIN}schedule: {{cron: \u0661 1 * * *, time_zone: UTC}}\n", 4, "cron line .* minute .* is none of"),
    ("run: pack\narguments:\n  data: embedded\n  resize: big\n", 4, "resize big: is no value for it; python -m pi"),
    ("run: compare\narguments:\n  runs: '{runs}'\n", 3, r"runs \{runs\}: .* for what comes after; here "),
    (f"{PLAIN}after: [evaluate]\n", 4, "entry 1 of after must be a mapping of run, arguments, resources"),
    (f"{AFTER}'{{runn}}'\n", 7, r"run \{runn\}: nothing is called \{runn\}; there are \{run\} and \{runs\}"),
    (f"{AFTER}'x/{{runs}}'\n", 7, r"run x/\{runs\}: \{runs\} are several words, and stand alone"),
    (f"{AFTER}'{{run}}'\n      limit: many\n", 8, "limit many: is no value for it; python -m pipeline.evaluate"),
    (f"{AFTER}'{{run}}'\n      limit: [1, 2]\n", 8, r"limit \[1, 2\]: is no value for it"),
    (f"{AFTER}'{{run}}'\n      protocols: [knn, linaer]\n", 8, "protocol 'linaer': unknown; did you mean linear"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "said"), FILES, ids=range(len(FILES)))
def test_whatever_a_file_holds_its_mistake_is_one_sentence(tmp_path, monkeypatch, text, line, said):
    monkeypatch.chdir(tmp_path)
    Path("night.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^night\.yaml:{line}: {said}") as caught:
        spec.load("night.yaml")
    assert "\n" not in str(caught.value)


SEARCH = """\
run: search
arguments:
  space:
    - lr=1e-4..1e-2
    - options.teacher_temp=0.02..0.08
  settings:
    - image_size=28
    - backbone=vit_s14
    - objective=dino
    - data=embedded
"""


@pytest.mark.parametrize(
    ("right", "wrong", "line", "said"),
    [
        ("lr=", "lrr=", 4, "lrr: no such option; did you mean --lr"),
        ("1e-4..1e-2", "1e-2..1e-4", 4, "must run from a number to a larger one"),
        ("1e-4..1e-2", "fast,slow", 4, "lr fast: is no value for it"),
        ("lr=1e-4..1e-2", "data=embedded,/no/such", 4, "data /no/such: no such file or folder here; correct it"),
        ("teacher_temp", "mask_ratio", 5, "options.mask-ratio: no such option"),
        ("image_size=28", "image_size=30", 7, "image-size 30: is no multiple of the patch of vit_s14"),
        ("image_size=28", "image_size", 7, "settings image_size: must be name=value"),
        ("vit_s14", "resnet81", 8, "backbone 'resnet81' is not known"),
        ("=dino", "=dinoo", 9, "objective dinoo: unknown; did you mean dino"),
        ("=embedded", "=/no/such", 10, "data /no/such: no such file or folder here; correct it"),
    ],
)
def test_what_a_search_gives_pretraining_is_checked_entry_by_entry(job, right, wrong, line, said):
    job(SEARCH)
    with pytest.raises(UserError, match=rf"^night\.yaml:{line}: .*{re.escape(said)}"):
        job(SEARCH.replace(right, wrong))
    if "data" in said:
        job(SEARCH.replace(right, wrong) + "data_on: cluster\n")


def test_an_axis_of_another_objective_than_that_of_the_data_left_open_is_refused(job, tmp_path):
    text = SEARCH.replace("    - objective=dino\n", "")
    job(text.replace("embedded", str(tmp_path)))
    with pytest.raises(UserError, match=r"^night\.yaml:5: options\.teacher-temp: no such option"):
        job(text)


def test_a_variable_is_written_as_it_is_in_the_file(job):
    assert job(PLAIN + "environment: {A: true, B: 'no', C: 0.5}\n").environment == {"A": "true", "B": "no", "C": "0.5"}


def test_data_of_the_cluster_is_looked_for_on_the_cluster(job):
    text = GOOD.replace("data: embedded\n", "data: /nowhere/photos\n") + "data_on: cluster\n"
    assert job(text).of(job(text).cells[0]).arguments["data"] == "/nowhere/photos"
    with pytest.raises(UserError, match=r"night\.yaml:3: data /nowhere/photos"):
        job(text, on_cluster=True)


def test_options_of_an_objective_left_open_are_those_that_pretraining_would_take(job, tmp_path):
    text = "run: pretrain\narguments: {data: DATA, options: {OPTION: 0.05}}\n"
    own, generated = text.replace("DATA", str(tmp_path)), text.replace("DATA", "embedded")
    job(own.replace("OPTION", "teacher_temp"))
    job(generated.replace("OPTION", "sigreg_weight"))
    with pytest.raises(UserError, match=r"options\.teacher-temp: no such option"):
        job(generated.replace("OPTION", "teacher_temp"))


def test_arguments_set_from_outside_take_the_place_of_an_axis(job):
    read = job(GOOD, "backbone=resnet18", "epochs=1", "betas=[0.9, 0.95]")
    assert [cell.name for cell in read.cells] == ["dino"]
    assert read.of(read.cells[0]).command()[4:] == [
        "--data", "embedded", "--epochs", "1", "--options.out-dim", "64", "--backbone", "resnet18",
        "--betas", "0.9", "0.95", "--objective", "dino",
    ]  # fmt: skip
    with pytest.raises(UserError, match="backbone 'resnet81' is not known"):
        job(GOOD, "backbone=resnet81")


def test_an_option_is_the_same_however_it_is_spelt(job):
    text = "run: pretrain\narguments: {data: embedded}\nmatrix:\n  batch-size: [8, 16]\n"
    assert [cell.values for cell in job(text).cells] == [{"batch_size": 8}, {"batch_size": 16}]
    set_outside = job(text, "batch_size=32")
    assert set_outside.of(*set_outside.cells).arguments == {"data": "embedded", "batch_size": 32}
    with pytest.raises(UserError, match=r"night\.yaml:4: batch-size is set under arguments too"):
        job(text.replace("embedded}", "embedded, batch_size: 8}"))
    with pytest.raises(UserError, match=r"night\.yaml:4: matrix batch-size: 8 is given twice"):
        job(text.replace("[8, 16]", "[8, '8']"))


def test_workers_among_the_arguments_are_the_jobs(job):
    """What is rendered asks for as many machines as the command will."""
    read = job(GOOD, "workers=2..4")
    assert {read.group(cell) for cell in read.cells} == {(2, 4)}
    with pytest.raises(UserError, match=r"workers 0: must be a whole number, at least 1"):
        job(GOOD, "workers=0")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("epochs=0", "epochs 0: must be at least 1"),
        ("batch-size=many", "batch-size many: is no value for it"),
        ("epoch=1", "epoch: no such option; did you mean --epochs"),
        ("options.out_dim=x", "options.out-dim x: is no value for it"),
        ("options={outdim: 1}", "options.outdim: no such option"),
        ("backbone=resnet81", "backbone 'resnet81' is not known"),
        ("data=nowhere/photos", "data nowhere/photos: no such file or folder here"),
        ("workers=0", "workers 0: must be a whole number"),
        ("run=mine", "run is the job's own"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_by_what_was_written(job, setting, said):
    with pytest.raises(UserError, match=f"^--set {re.escape(setting)}: {re.escape(said)}"):
        job(GOOD, setting)


def test_each_cell_may_have_workers_of_its_own(job):
    text = GOOD.replace("objective: [dino]", "workers: [1, 2..4]").replace("workers: 2\n", "")
    read = job(text)
    assert [read.group(cell) for cell in read.cells] == [(1, 1), (2, 4)] * 2
    assert [read.of(cell).arguments["workers"] for cell in read.cells] == [1, "2..4"] * 2
    with pytest.raises(UserError, match=r"night\.yaml:9: workers 0: must be a whole number"):
        job(text.replace("[1, 2..4]", "[1, 0]"))
    with pytest.raises(UserError, match=r"night\.yaml:9: workers is set outside the matrix too; keep one"):
        job(GOOD.replace("objective: [dino]", "workers: [1, 2]"))
    assert job(text, "workers=3").group(job(text, "workers=3").cells[0]) == (3, 3)


def test_a_setting_hides_no_mistake_of_the_file(job):
    for text, said in (("", "run is missing"), ("run: pack\narguments: [a]\n", "arguments must be a mapping")):
        with pytest.raises(UserError, match=said):
            job(text, "limit=1")


def test_entry_points_are_modules_and_packages():
    assert {"pretrain", "evaluate", "tracking", "watch"} < set(entry_points())
    assert "config" not in entry_points()


def test_names_of_cells_never_meet(job):
    text = "run: pretrain\narguments: {data: embedded}\nmatrix: {backbone: [timm/x, timm_x]}\n"
    assert (
        len({cell_name(values) for values in (["timm/x"], ["timm_x"], ["a-b", "c"], ["a", "b-c"], ["a", "b", "c"])})
        == 5
    )
    with pytest.raises(UserError, match=r"night\.yaml:3: backbone 'timm/x'"):
        job(text)
    with pytest.raises(UserError, match="a job is named by its file"):
        job(GOOD, name="My Job.yaml")


def test_ids_are_the_same_for_the_same_firing(job):
    read = job(GOOD)
    now = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)
    assert which_firing(read, "scheduled", now) == "20261124T001500Z"
    assert which_firing(read, "scheduled", datetime(2026, 11, 24, 0, 14, 45, tzinfo=UTC)) == "20261124T001500Z"
    assert which_firing(read, "scheduled", datetime(2026, 11, 24, 0, 14, 15, tzinfo=UTC)) == "20261123T001500Z"
    assert which_firing(read, None, now) == "20261124T093000Z"
    assert read.submission("20261124T001500Z", "lenet5-dino") == "night-20261124T001500Z-lenet5-dino"
    with pytest.raises(UserError, match="must be scheduled, or a time as in"):
        which_firing(read, "tonight", now)


def test_a_job_that_is_not_there_is_told_with_those_that_are(job, tmp_path):
    job(GOOD)
    with pytest.raises(UserError, match=r"nigt\.yaml: no such file; there are .*night\.yaml"):
        spec.load("nigt.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_of_the_repository_is_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = spec.load(path.stem)
    assert job.timetable is None or job.timetable.schedule.cron
    for step in (job.step, *job.after):
        assert "output" not in step.arguments, "each firing would write over what the last one wrote"


def test_checkpoints_are_watched_on_the_day_after_one_of_23_hours_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    watch = spec.load("checkpoints")
    start = datetime(2026, 1, 1, tzinfo=UTC)
    firings = watch.timetable.schedule.firings(start, start + timedelta(days=365))
    lasts = timedelta(hours=watch.step.arguments["hours"])
    assert any(first + lasts > second for first, second in pairwise(firings))
    assert watch.timetable.overlap == "wait"


def test_checking_imports_no_torch():
    program = (
        "import sys; from jobs import submit, render, scheduler; print({'torch', 'ray', 'mlflow'} & {*sys.modules})"
    )
    done = python("-c", program, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_comes_after_every_job_is_read_by_its_entry_point_as_it_is_meant(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for step in spec.load(path.stem).after:
        _, name, *words = step.command("/runs/a", ["/runs/a", "/runs/b"])
        given = read(importlib.import_module(name).Arguments, words, name)
        folders = {"{run}": "/runs/a", "{runs}": ("/runs/a", "/runs/b")}
        for key, value in step.arguments.items():
            assert getattr(given, key) == folders.get(value, value)
