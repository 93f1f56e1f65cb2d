"""Rendered files: right by the schemas and tools of whoever reads them, every argument quoted, no secret in them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import jsonschema
import pytest
import yaml
from job_toys import ROOT, python, schema_of

from jobs import firing, spec
from jobs.job import Job, Timetable
from jobs.render import Arguments, render
from jobs.render.raycronjob import kubernetes_name
from jobs.render.systemd import calendars
from jobs.schedule import Schedule, parse
from pipeline.errors import UserError

NASTY = [
    "it's",
    'a "b" c',
    "$(touch owned)",
    "`touch owned`",
    "${HOME} %h %% 100%",
    "a;b|c&d",
    "back\\slash",
    "a\\%b \\\\%c",
    "a$$b",
    "*",
    "-dash",
    "ü",
]
JOB = """
run: pretrain
arguments: {data: embedded}
matrix:
  backbone: [lenet5, vit_ti8]
schedule: {cron: 30 2 1 * mon, time_zone: Europe/Berlin}
workers: 2
resources: {cpus: 4, gpus: 1, memory: 16GiB}
secrets: [MLFLOW_TRACKING_TOKEN]
time_limit: 8h
after:
  - {run: evaluate, arguments: {run: "{run}"}}
"""
SLURM = """
srun() { shift; "$@"; }; scontrol() { echo here; }
ray() { while [ "$1" != -- ]; do shift; done; shift; "$@"; }
SLURM_JOB_NODELIST=x SLURM_JOB_NUM_NODES=2 SLURM_JOB_ID=${SLURM_JOB_ID:-7}
"""
TARGETS = ("cron", "systemd", "kubernetes", "raycronjob", "slurm")


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "value-of-the-token")

    def write(text: str = JOB, *settings: str, folder: str = "jobs") -> Job:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "night.yaml").write_text(text)
        return spec.load(f"{folder}/night.yaml", settings)

    return write


def rendered(job: Job, to: str, **options) -> str:
    options = {"folder": "/srv/pre training", **options}
    return render(job, Arguments(str(job.path), to, set=job.settings, **options))


@pytest.fixture(scope="module")
def ray_cron_job_schema():
    return schema_of("raycronjobs")


def test_an_elastic_job_asks_for_as_many_machines_as_there_are(job):
    elastic = job(JOB.replace("workers: 2", "workers: 2..4"))
    script = rendered(elastic, "slurm")
    assert "#SBATCH --nodes=2-4\n" in script
    assert '--min-nodes "$SLURM_JOB_NUM_NODES" ' in script, "symmetric-run waits for just so many"
    first = next(iter(yaml.safe_load_all(rendered(elastic, "raycronjob", volume="photos"))))
    workers = first["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (2, 4, 4)


def test_each_cell_asks_for_the_workers_of_its_own(job):
    text = JOB.replace("workers: 2\n", "").replace("[lenet5, vit_ti8]", "[lenet5]\n  workers: [1, 2..4]")
    documents = list(yaml.safe_load_all(rendered(job(text), "raycronjob", volume="photos")))
    groups = [d["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"][0] for d in documents]
    assert [(group["minReplicas"], group["maxReplicas"]) for group in groups] == [(1, 1), (2, 4)]
    with pytest.raises(UserError, match="cells ask for different numbers of workers, and all tasks of a SLURM array"):
        rendered(job(text), "slurm")
    assert "#SBATCH --nodes=3\n" in rendered(job(text, "workers=3"), "slurm")


@pytest.mark.parametrize(
    ("name", "head", "workers", "slurm"),
    [
        ("tuning", ("4", "1", 16), None, ("4", "1")),
        ("checkpoints", ("1", None, 4), None, ("1", None)),
        ("nightly", ("4", "1", 16), ("8", "1", 32), ("8", "1")),
        ("weekly", ("4", "1", 16), ("8", "1", 32), ("8", "1")),
    ],
)
def test_a_ready_jobs_machines_hold_all_that_it_runs_on_them(name, head, workers, slurm, monkeypatch):
    monkeypatch.chdir(ROOT)
    ready = spec.load(name)
    cluster = next(yaml.safe_load_all(rendered(ready, "raycronjob", volume="data")))["spec"]["jobTemplate"]
    pods = [cluster["rayClusterSpec"]["headGroupSpec"], *cluster["rayClusterSpec"].get("workerGroupSpecs", [])]
    for pod, wanted in zip(pods, (head, workers)):
        limits = pod["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (limits["cpu"], limits.get("nvidia.com/gpu"), int(limits["memory"]) >> 30) == wanted
    assert len(pods) == 1 + bool(workers)
    for amount in ("num-cpus", "num-gpus"):
        assert pods[0]["rayStartParams"].get(amount) == ("0" if workers else None), "training keeps to the workers"
    script = rendered(ready, "slurm")
    assert f"#SBATCH --cpus-per-task={slurm[0]}\n" in script
    assert (f"#SBATCH --gpus-per-node={slurm[1]}\n" in script) == (slurm[1] is not None)


def test_what_comes_after_in_place_has_its_time(job):
    script, limit = rendered(job(), "slurm"), 2 * 8 * 60
    assert f"#SBATCH --time={limit + 10}\n" in script
    assert "# time: its limit for the job and for each step after it, and 10 minutes.\n" in script
    first = next(yaml.safe_load_all(rendered(job(), "raycronjob", volume="photos")))
    assert first["spec"]["jobTemplate"]["activeDeadlineSeconds"] == pytest.approx(limit * 66 + 1800, abs=1)
    alone = rendered(job(JOB[: JOB.index("after:")]), "slurm")
    assert "#SBATCH --time=490\n" in alone
    assert "# time:" not in alone


def test_paths_at_which_no_volume_is_mounted_are_told(job, monkeypatch):
    text = JOB + "data_on: cluster\n"
    text = text.replace("{data: embedded}", "{data: /data/photos, storage: /runs}")
    said = "# No volume is mounted at {}: --volume CLAIM mounts one at /data"
    assert said.format("/data/photos, /runs") in rendered(job(text), "raycronjob")
    assert said.format("/runs") in rendered(job(text), "raycronjob", volume="photos")
    within = text.replace("/runs", "s3://bucket/runs")
    assert "# No volume" not in rendered(job(within), "raycronjob", volume="photos")
    assert said.format("~/ssl-runs") in rendered(job(), "raycronjob")
    monkeypatch.chdir(ROOT)
    assert said.format("/data/photos, /data/runs") in rendered(spec.load("tuning"), "raycronjob")


def test_raycronjobs_fit_kuberays_own_schema(job, ray_cron_job_schema):
    documents = list(yaml.safe_load_all(rendered(job(), "raycronjob", volume="photos")))
    assert [d["metadata"]["name"] for d in documents] == ["ssl-night-lenet5", documents[1]["metadata"]["name"]]
    assert re.fullmatch("ssl-night-vit-ti8-[0-9a-f]{8}", documents[1]["metadata"]["name"])
    for document in documents:
        jsonschema.Draft202012Validator(ray_cron_job_schema).validate(document)
        cluster = document["spec"]["jobTemplate"]["rayClusterSpec"]
        assert cluster["workerGroupSpecs"][0]["replicas"] == 2
        limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits == {"cpu": "4", "memory": str(16 << 30), "nvidia.com/gpu": "1"}
    wrong = json.loads(json.dumps(documents[0]))
    wrong["spec"]["jobTemplate"]["entryPoint"] = "a key that the schema does not know"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(ray_cron_job_schema).validate(wrong)


def test_the_names_of_raycronjobs_leave_room_for_what_kuberay_appends():
    cells = ["", "a", "x" * 60, "a" * 31 + "-b", *("resnet50-" + "m" * count for count in range(20))]
    found = [kubernetes_name(job, cell) for job in ("night", "n" * 40, "n" * 37, "n" * 38) for cell in cells]
    assert max(map(len, found)) == 41, "a RayJob is named by it, a hyphen and 5 characters; 47 are allowed"
    assert all(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("version", ["1.27", "1.30", "1.34", "1.37"])
def test_a_cronjob_fits_kubernetes_own_schema(job, version):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas: kubernetes-validate is absent")
    text = JOB + "environment: {NCCL_DEBUG: WARN}\n"
    for address in (None, "http://head:8265"):
        document = yaml.safe_load(rendered(job(text), "kubernetes", address=address))
        assert kubernetes.validate(document, version, strict=True) == version
    assert document["spec"]["timeZone"] == "Europe/Berlin"
    assert re.fullmatch("[a-z0-9]([-a-z0-9]{,50}[a-z0-9])?", document["metadata"]["name"]), "52 characters at most"
    pod = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for place, key, value in (
        (pod["containers"][0], "comand", []),
        (pod["containers"][0]["resources"], "requests", ["cpu"]),
        (document["spec"], "timezone", "UTC"),
        (document["spec"], "startingDeadlineSeconds", "3600"),
        (document["spec"]["jobTemplate"]["spec"], "backoffLimit", 1.5),
    ):
        before = place.get(key)
        place[key] = value
        with pytest.raises(jsonschema.ValidationError):
            kubernetes.validate(document, version, strict=True)
        place.pop(key) if before is None else place.update({key: before})
    assert kubernetes.validate(document, version, strict=True) == version


@pytest.mark.parametrize("to", ["kubernetes", "raycronjob"])
def test_kubernetes_is_told_sunday_as_it_knows_it(job, to):
    sunday = job(JOB.replace("30 2 1 * mon", "0 4 * * 7"))
    assert next(yaml.safe_load_all(rendered(sunday, to)))["spec"]["schedule"] == "0 4 * * 0"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("folder", ["plain", *NASTY, "a blank ", "%h $HOME 'x' \"y\"\\"])
def test_systemd_takes_the_units_and_reads_every_word_as_it_is(job, tmp_path, folder):
    settings = [f"storage={word}" for word in NASTY]
    text = rendered(job(JOB, *settings), "systemd", folder=f"/srv/{folder}")
    for part in re.split(r"^# --- ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        (tmp_path / name).write_text(body)
    units = [str(tmp_path / "ssl-night.service"), str(tmp_path / "ssl-night.timer")]
    done = verify(*units)
    assert done.returncode == 0, done.stderr
    assert not [line for line in (done.stderr + done.stdout).splitlines() if "ssl-night" in line]
    read = verify(units[0], SYSTEMD_LOG_LEVEL="debug").stdout  # with what systemd made of it, quoted for a shell
    assert f"\t\tWorkingDirectory: /srv/{folder}\n" in read
    (command,) = re.findall(r"\t\t\tCommand Line: (.+)\n", read)
    submit = ["-m", "jobs.submit", "jobs/night.yaml", "--firing", "scheduled", "--set"]
    listed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, timeout=30)
    got = [word.replace("$$", "$") for word in listed.stdout.split("\0")[:-1]]  # as it does when it starts them
    assert got == ["/usr/bin/env", ".venv/bin/python", *submit, *settings]
    (tmp_path / "ssl-night.timer").write_text("[Timer]\nOnCalender=daily\n")
    assert "ssl-night.timer" in verify(units[1]).stderr


def test_a_cluster_that_is_away_for_a_while_loses_no_firing_or_the_file_says_so(job):
    service = rendered(job(), "systemd").partition("# --- ssl-night.timer")[0]
    assert "\nType=oneshot\n" in service
    assert "\nRestart=on-failure\nRestartSec=60\n" in service, "submit fails where no cluster answers"
    assert "\nStartLimitIntervalSec=4h\nStartLimitBurst=64\n" in service, "one firing an hour, tried for an hour"
    often = rendered(job(JOB.replace("30 2 1 * mon", '"*/2 * * * *"')), "systemd")
    assert "\nStartLimitBurst=180\n" in often, "120 firings in 4 hours are no failure"
    assert "# A firing is lost where the cluster is away: cron tries it once" in rendered(job(), "cron")


def verify(*units: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    line = ["systemd-analyze", "verify", "--man=no", *units]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    "line", ["15 1 * * *", "*/20 8-17 * * 1-5", "0 6 31 * *", "0 4 29 2 *", "30 4 1,15 * mon", "0 0 * * 7"]
)
@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC"])
def test_systemd_reads_the_same_times_as_we_do(line, zone):
    schedule = Schedule(parse(line), ZoneInfo(zone))
    start, found = datetime(2026, 11, 24, tzinfo=UTC), set()
    for calendar in calendars(Timetable(schedule, "skip", "last")):
        done = subprocess.run(
            ["systemd-analyze", "calendar", "--iterations=8", "--base-time=2026-11-24 00:00:00 UTC", calendar],
            capture_output=True, text=True, timeout=60, env={**os.environ, "TZ": "UTC"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        times = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", done.stdout)
        assert times, done.stdout
        found |= {datetime.fromisoformat(time).replace(tzinfo=UTC) for time in times}
    first, after = sorted(found)[:5], start
    for time in first:
        assert schedule.next(after) == time
        after = time


def as_cron_reads(line: str) -> str:
    """What cron gives to the shell: a % after a backslash that is itself after none is a %, any other ends it."""
    script, escaped = "", False
    for character in line:
        assert escaped or character != "%", "the rest would be standard input"
        script = script[:-1] + "%" if escaped and character == "%" else script + character
        escaped = character == "\\" and not escaped
    return script


def test_shell_scripts_parse_and_every_word_arrives_as_it_is(job, tmp_path):
    """A shell reads the rendered line; a stand-in for Python, a program of its own, writes down what it is given."""
    settings = [f"storage={word}" for word in NASTY]
    for to in ("cron", "slurm"):
        for i, setting in enumerate(settings):
            folder = tmp_path / f"{to} {i} $(x)"
            (folder / ".venv" / "bin").mkdir(parents=True)
            recorder = folder / ".venv" / "bin" / "python"
            recorder.write_text(
                f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('got.json', 'w'))\n"
            )
            recorder.chmod(0o755)
            text = rendered(job(JOB.replace("MLFLOW_TRACKING_TOKEN", "HOME"), setting), to, folder=str(folder))
            if to == "cron":
                script = as_cron_reads(text.splitlines()[-1].split(" ", 5)[5])
            else:
                script = SLURM + text
                assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
            done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
            got = json.loads((folder / "got.json").read_text())
            assert got[got.index("--set") + 1] == setting
            assert not list(tmp_path.rglob("owned"))


def test_variables_arrive_as_they_are(job, tmp_path):
    values = {f"WORD_{i}": word for i, word in enumerate(NASTY)}
    night = job(JOB + f"environment: {json.dumps(values)}\n")
    cron_job = yaml.safe_load(rendered(night, "kubernetes"))
    containers = list(cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"])
    for ray_cron_job in yaml.safe_load_all(rendered(night, "raycronjob", volume="v")):
        cluster = ray_cron_job["spec"]["jobTemplate"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            containers += group["template"]["spec"]["containers"]
    assert len(containers) == 5
    for container in containers:
        got = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert {name: got[name].replace("$$", "$") for name in values} == values
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    recorder = tmp_path / ".venv" / "bin" / "python"
    recorder.write_text(f"#!{sys.executable}\nimport json, os\njson.dump(dict(os.environ), open('got.json', 'w'))\n")
    recorder.chmod(0o755)
    script = SLURM + rendered(night, "slurm", folder=str(tmp_path))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "got.json").read_text())
    assert {name: got[name] for name in values} == values


def test_the_tasks_of_a_submission_and_a_requeue_of_it_are_one_firing(job, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.write_text('#!/bin/bash\n[ "$2" = jobs.firing ] && exec date +%N\necho "$5" >>firings\n')
    fake.chmod(0o755)
    night = job(JOB.replace("MLFLOW_TRACKING_TOKEN", "HOME"), "storage=elsewhere")
    script = SLURM + rendered(night, "slurm", folder=str(tmp_path))
    tasks = [
        subprocess.Popen(["bash", "-c", script], env={**os.environ, "SLURM_ARRAY_JOB_ID": array, "SLURM_JOB_ID": task})
        for array, task in (("1", "1"), ("1", "2"), ("1", "3"), ("1", "4"), ("5", "5"))
    ]
    assert [task.wait(30) for task in tasks] == [0] * 5
    again = {**os.environ, "SLURM_ARRAY_JOB_ID": "1", "SLURM_JOB_ID": "2"}
    assert subprocess.run(["bash", "-c", script], env=again, timeout=30).returncode == 0
    told = subprocess.run(["bash", "-c", script], env={**again, "FIRING": "mine"}, timeout=30)
    assert told.returncode == 0
    assert "jobs.firing jobs/night.yaml --set storage=elsewhere >" in script
    counts = Counter((tmp_path / "firings").read_text().split())
    assert sorted(counts.values()) == [1, 1, 5]
    assert counts["mine"] == 1


def test_the_firing_of_a_job_can_be_asked_for(job, capsys):
    job()
    assert firing.show(firing.Arguments("jobs/night.yaml", ("storage=elsewhere",))) == 0
    assert firing.FIRING.fullmatch(capsys.readouterr().out.strip())


def test_a_ray_that_does_not_start_fails_the_script_though_symmetric_run_says_nothing(job, tmp_path):
    text = rendered(job(JOB.replace("MLFLOW_TRACKING_TOKEN", "HOME")), "slurm", folder=str(tmp_path))
    script = f"{SLURM}FIRING=now\nray() {{ echo Failed to start Ray; }}\n{text}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "nothing ran: Ray did not start, for the reason above\n")


def test_kubernetes_words_arrive_as_they_are(job):
    for word in NASTY:
        setting = f"storage={word}"
        command = yaml.safe_load(rendered(job(JOB, setting), "kubernetes"))["spec"]["jobTemplate"]["spec"]["template"][
            "spec"
        ]
        got = command["containers"][0]["command"][-1]
        # Kubernetes replaces $(NAME) where NAME is a variable, and makes $$ into $.
        assert got.replace("$$", "$") == setting
        assert not re.search(r"(?<!\$)(\$\$)*\$\(", got)
        entrypoint = next(yaml.safe_load_all(rendered(job(JOB, setting), "raycronjob", volume="v")))["spec"][
            "jobTemplate"
        ]["entrypoint"]
        assert shlex.split(entrypoint)[-1] == setting


def test_a_job_of_an_odd_name_is_quoted(job):
    assert "'it'\"'\"'s $(x)/night.yaml'" in rendered(job(JOB, folder="it's $(x)"), "cron")


@pytest.mark.parametrize("to", TARGETS)
def test_no_secret_is_rendered(job, to):
    text = rendered(job(), to, volume="photos")
    assert "value-of-the-token" not in text
    assert "MLFLOW_TRACKING_TOKEN" in text
    for options in (
        {"address": "https://me:hunter2@head:8265"},
        {"image": "https://me:hunter2@registry/ssl"},
        {"folder": "/srv/token=hunter2"},
        {"volume": "token=hunter2"},
    ):
        with pytest.raises(UserError, match="looks like a secret, and a rendered file holds none") as caught:
            rendered(job(), to, **options)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASSWORD", "12345678"),
        ("DB_PASS", "0.25"),
        ("AZURE_STORAGE_KEY", "bG9uZw=="),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=bG9uZw=="),
        ("STORE", "AccountName=me;AccountKey=bG9uZw=="),
        ("SECRET_KEY", "a1b2c3"),
        ("PRIVATE_KEY", "a1b2c3"),
        ("HOOK", "https://hooks.slack.com/services/T00000000/B00000000/a1b2c3"),
    ],
)
def test_a_value_that_is_a_secret_is_not_taken_to_be_rendered(job, name, value):
    with pytest.raises(UserError, match=f"{name} looks like a secret") as caught:
        job(JOB + f"environment: {{{name}: {value}}}\n")
    assert value not in str(caught.value)


def test_a_webhook_that_is_a_secret_is_not_taken_but_a_switch_is(job):
    with pytest.raises(UserError, match="webhook looks like a secret"):
        job(JOB + "notify: {webhook: https://hooks.slack.com/services/T00000000/B00000000/a1b2c3}\n")
    switch = job(JOB + "environment: {HF_HUB_DISABLE_IMPLICIT_TOKEN: 1}\n")
    assert switch.environment == {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


@pytest.mark.parametrize("to", TARGETS)
def test_a_webhooks_variable_is_named_and_reaches_every_pod(job, to):
    notify = "notify: {webhook: $SSL_WEBHOOK}\n"
    text = rendered(job(JOB + notify), to, volume="photos")
    assert len(re.findall("^# It tells the webhook whose address SSL_WEBHOOK holds", text, re.MULTILINE)) >= 1
    if to == "systemd":
        without = JOB.replace("secrets: [MLFLOW_TRACKING_TOKEN]\n", "")
        assert "EnvironmentFile=" in rendered(job(without + notify), to)
        assert "EnvironmentFile=" not in rendered(job(without), to)
    pods = {"kubernetes": 1, "raycronjob": 4}.get(to, 0)
    found = [
        entry["valueFrom"]["secretKeyRef"]
        for document in (yaml.safe_load_all(text) if pods else ())
        for entry in environment_entries(document)
        if entry["name"] == "SSL_WEBHOOK"
    ]
    assert found == [{"name": "ssl-night", "key": "SSL_WEBHOOK", "optional": True}] * pods, "a pod starts without it"
    for plain in ("environment: {SSL_WEBHOOK: 'http://here'}\n" + notify, "notify: {webhook: 'http://here'}\n"):
        assert "It tells" not in rendered(job(JOB + plain), to, volume="photos")


def environment_entries(value) -> list[dict]:
    if isinstance(value, dict):
        inner = [entry for key, one in value.items() if key != "env" for entry in environment_entries(one)]
        return [*value.get("env", []), *inner]
    return [entry for one in value for entry in environment_entries(one)] if isinstance(value, list) else []


@pytest.mark.parametrize("to", ["cron", "systemd", "slurm"])
def test_a_folder_is_a_whole_path_since_who_runs_the_file_begins_elsewhere(job, to, tmp_path):
    begin = {"cron": " cd {} && exec ", "systemd": "\nWorkingDirectory={}/\n", "slurm": "\ncd {}\n"}[to]
    night = job()
    assert begin.format(tmp_path) in render(night, Arguments("night", to))
    assert begin.format(tmp_path / "here") in render(night, Arguments("night", to, folder="here"))
    assert begin.format("/srv/here") in render(night, Arguments("night", to, folder="/srv/here/"))


def test_what_cannot_be_said_is_refused(job):
    with pytest.raises(UserError, match="has no schedule, which cron needs"):
        rendered(job("run: pack\narguments: {data: embedded}\n"), "cron")
    with pytest.raises(UserError, match="the end of a line"):
        rendered(job(JOB, "storage=a\nb"), "cron")
    once = JOB.replace('{run: evaluate, arguments: {run: "{run}"}}', "{run: pack, arguments: {data: embedded}}")
    with pytest.raises(UserError, match="need a volume that they share"):
        rendered(job(once), "raycronjob")


def test_a_firing_that_others_skip_is_told(job):
    daily = JOB.replace("30 2 1 * mon", "30 2 * * *")
    for to in ("systemd", "kubernetes", "raycronjob"):
        assert re.search(r"# \d{4}-03-\d\d 02:30 does not exist in Europe/Berlin: \w+ skips", rendered(job(daily), to))
    assert "does not exist" not in rendered(job(daily.replace("30 2", "15 1")), "systemd")


@pytest.mark.parametrize(
    ("to", "missed", "said"),
    [
        ("cron", "last", "cron cannot do missed: last; of the firings in an outage, none is made up for."),
        ("cron", "none", None),
        ("systemd", "last", None),
        ("systemd", "none", None),
        ("systemd", "all", "systemd cannot do missed: all; of the firings in an outage, the last is made up for."),
        ("kubernetes", "last", "Kubernetes cannot do missed: last; .*, the last is made up for within an hour."),
        ("kubernetes", "none", "Kubernetes cannot do missed: none; .*, the last is made up for within an hour."),
        ("raycronjob", "last", None),
        ("raycronjob", "none", "RayCronJob cannot do missed: none; of .* outage, the last is made up for."),
    ],
)
def test_firings_in_an_outage_are_treated_as_the_job_says_or_the_file_tells(job, to, missed, said):
    text = rendered(job(JOB.replace("Berlin}", f"Berlin, missed: {missed}}}")), to, volume="photos")
    found = re.findall("^# (.*cannot do missed.*)$", text, re.MULTILINE)
    assert len(found) == bool(said)
    assert said is None or re.fullmatch(said, found[0])
    if to == "systemd":
        assert f"\nPersistent={'false' if missed == 'none' else 'true'}\n" in text


def test_the_command_line_prints_the_file(job, tmp_path):
    job()
    done = python("-m", "jobs.render", "night", "--to", "slurm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=ssl-night\n#SBATCH --nodes=2\n")
