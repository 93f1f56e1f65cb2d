"""What jobs want of Ray: its job API, a call on a spare worker, and Tune. Training itself is `pipeline.cluster`'s."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.redaction import redact

FAILED = ("FAILED", "STOPPED")
ENDED = ("SUCCEEDED", *FAILED)
STOPPING = 120
"""Seconds that a stopped job is given to leave a checkpoint, before Ray kills it; its own default is 3."""
SILENT = 20.0
"""Seconds of waiting for a spare worker that are not spoken of."""
SETTLED = 5.0
"""Seconds after the end of a job until Ray watches it no more; it would take the next of that id for dead with it."""
LEFT_BEHIND = [".git", ".venv", ".cache", "runs", "mlruns", "build", "dist", "*.egg-info", "__pycache__", "*.beton"]


@dataclass(frozen=True)
class Submitted:
    """A submission of ours; times are in UTC, None where they are not known yet."""

    id: str
    job: str
    firing: str
    cell: str
    step: str
    status: str
    message: str
    started: datetime | None
    ended: datetime | None
    unplaced: bool = False
    """Whether Ray gave it up, since no machine had what it takes for RAY_JOB_START_TIMEOUT_SECONDS."""

    @property
    def running(self) -> bool:
        """Whether it has not ended, be it that it still waits for its turn."""
        return self.status not in ENDED


class Refused(UserError):
    """The job API answers with an error; `said` is all of it, Ray's traceback included."""

    def __init__(self, error: Exception) -> None:
        self.said = redact(str(error)).strip()
        self.why = (self.said.strip("\n.").splitlines() or [type(error).__name__])[-1]
        super().__init__(f"the cluster's job API answers with an error ({self.why})")


class Client:
    """A cluster's job API. All that is asked of it raises `UserError` where it answers no more, `Refused` for an error.

    Args:
        address: http://HOST:8265; left open, RAY_ADDRESS, or the cluster on this machine; from a job on another node
            than the head, on whose loopback it listens, it is reached through a task there.

    Raises:
        UserError: none answers, or the address is none of it.
    """

    def __init__(self, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_TOKEN" in os.environ or Path.home().joinpath(".ray", "auth_token").exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        if address and "://" not in address and address != "auto":  # Ray takes it for that of its control store
            raise UserError(f"--address {redact(address)}: must be that of the job API, as in http://HOST:8265")
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        try:
            self.api: Any = JobSubmissionClient(address)
        except (RayError, RuntimeError, ValueError, OSError) as error:
            if address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # in a job
                self.api = _OnTheHead()
                return
            named = f"--address {redact(address)}" if address else "RAY_ADDRESS, or the cluster on this machine"
            why = redact(str(error)).strip().splitlines()[0][:200]
            raise UserError(
                f"{named}: no cluster's job API answers there ({why}); start one, or give --address"
            ) from None

    def _ask(self, name: str, *words: Any, **options: Any) -> Any:
        from requests import RequestException  # what Ray asks it by

        try:
            return getattr(self.api, name)(*words, **options)
        except (ConnectionError, RequestException) as error:
            why = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"the cluster's job API answers no more ({why}); ask again once it does") from None
        except RuntimeError as error:
            raise Refused(error) from None

    def submitted(self, job: str | None = None, firing: str | None = None, cell: str | None = None) -> list[Submitted]:
        """What was submitted here, oldest first."""
        found = []
        for details in self._ask("list_jobs"):
            about = details.metadata or {}
            if "job" in about and details.submission_id:
                found.append(
                    Submitted(
                        id=details.submission_id, job=about["job"], firing=about.get("firing", ""),
                        cell=about.get("cell", ""), step=about.get("step", ""),
                        status=str(getattr(details.status, "value", details.status)),
                        message=(details.message or "").strip(), started=_time(details.start_time),
                        ended=_time(details.end_time),
                        unplaced=details.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
                    )
                )  # fmt: skip
        wanted = (s for s in found if (job in (None, s.job)) and firing in (None, s.firing) and cell in (None, s.cell))
        return sorted(wanted, key=lambda s: (s.firing, s.started or datetime.max.replace(tzinfo=UTC), s.id))

    def submit(
        self,
        submission: str,
        command: str,
        *,
        environment: dict[str, Any],
        about: dict[str, str],
        cpus: float = 0,
        gpus: float = 0,
        memory: int = 0,
    ) -> bool:
        """Submit a command under an id; False where that id was submitted before, and nothing was done."""
        takes: dict[str, Any] = {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus, "entrypoint_memory": memory}
        try:
            self._ask(
                "submit_job", entrypoint=command, submission_id=submission, runtime_env=environment, metadata=about,
                **{key: value for key, value in takes.items() if value},
            )  # fmt: skip
        except (Refused, ValueError) as error:
            refused = error if isinstance(error, Refused) else Refused(error)
            if f"{submission} already exists" in refused.said:
                return False
            raise UserError(f"{submission}: the cluster refuses it ({refused.why})") from None
        return True

    def logs(self, submission: str) -> str | None:
        """All it has said so far; None where that is gone, as with its node."""
        try:
            return str(self._ask("get_job_logs", submission))
        except Refused:
            return None

    def stop(self, submission: str) -> None:
        """Ask it to end; it is given time for a checkpoint."""
        self._ask("stop_job", submission)

    def forget(self, submissions: Sequence[str]) -> None:
        """Give up the records of some that have ended, so that their ids can be submitted again; their logs go on."""
        if submissions:
            time.sleep(SETTLED)
        for submission in submissions:
            try:
                self._ask("delete_job", submission)
            except Refused as error:
                raise UserError(f"{submission}: the cluster keeps its record ({error.why})") from None

    def wait(self, submissions: Iterable[str], every: float = 2.0) -> dict[str, str]:
        """Wait until all of them have ended; their statuses."""
        ids = list(submissions)
        while True:
            states = {s: self._status(s) for s in ids}
            if all(status in ENDED for status in states.values()):
                return states
            time.sleep(every)

    def _status(self, submission: str) -> str:
        """How one stands; one that is not there may be about to be submitted anew."""
        try:
            status = self._ask("get_job_status", submission)
        except Refused:
            time.sleep(SETTLED)
            status = self._ask("get_job_status", submission)
        return str(getattr(status, "value", status))


class _OnTheHead:
    """The job API as a task on the head's machine reaches it; asked for from a job of the same cluster."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*words: Any, **options: Any) -> Any:
            import ray

            from pipeline.cluster import connect

            if not ray.is_initialized():
                connect(1)
            there = ray.remote(_ask).options(num_cpus=0, resources={"node:__internal_head__": 0.001})
            return ray.get(there.remote(name, words, options))

        return ask


def _ask(name: str, words: Sequence[Any], options: Mapping[str, Any]) -> Any:
    import ray
    from ray.job_submission import JobSubmissionClient

    os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # of the job that asks, which it did not answer
    return getattr(JobSubmissionClient(ray.get_runtime_context().gcs_address), name)(*words, **options)


def environment(working_dir: str | Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of a submission: this code, without what does not belong to it, and plain variables."""
    return {
        "working_dir": str(working_dir),
        "excludes": LEFT_BEHIND,
        "env_vars": {**variables, "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING)},
    }


def select(client: Client, word: str, firing: str | None, cell: str | None) -> list[Submitted]:
    """The submissions that a command is about: one by its id, or of a job's newest firing unless another is named.

    Raises:
        UserError: there is none.
    """
    everything = client.submitted()
    if same := [s for s in everything if s.id == word]:
        return same
    name = Path(word).stem if word.endswith((".yaml", ".yml")) else word
    found = [s for s in everything if s.job == name and cell in (None, s.cell)]
    if firing is None and found:
        firing = found[-1].firing
    found = [s for s in found if s.firing == firing]
    if not found:
        known = sorted({s.job for s in everything})
        there = f"there are submissions of {', '.join(known)}" if known else "nothing was submitted to this cluster"
        raise UserError(f"{word}: no such submission or job{f' at {firing}' if firing else ''}; {there}")
    return found


class NoneFree(Exception):
    """No worker became free in time."""


def on_a_spare_worker(
    function: Callable[..., Any], *arguments: Any, cpus: float, gpus: float, waits: Callable[[str], object],
    patience: float | None = None,
) -> Any:  # fmt: skip
    """Call a function on the connected cluster, where CPUs and GPUs are free, at its machine's lowest priority.

    Args:
        waits: takes a sentence for the user, where none has become free for a while.
        patience: seconds to wait for one; left open: for ever.

    Raises:
        NoneFree: they are over.
    """
    import ray

    over = None if patience is None else time.monotonic() + patience
    takes = {"num_cpus": cpus, "num_gpus": gpus}
    worker = ray.remote(_Polite).options(**takes, scheduling_strategy="SPREAD").remote()
    try:
        begun = worker.__ray_ready__.remote()
        if not ray.wait([begun], timeout=SILENT if patience is None else min(SILENT, patience))[0]:
            waits(_waiting(cpus, gpus))
            if not ray.wait([begun], timeout=None if over is None else max(0.0, over - time.monotonic()))[0]:
                raise NoneFree
        return ray.get(worker.call.remote(function, arguments))
    finally:
        ray.kill(worker)


def step_aside() -> None:
    """Have this thread, and those it begins, take of each core what nobody else wants.

    Ray's workers, those that train among them, are nice 15 already: of a core that both want, one of nice 19 took
    29 %, this takes 8 %.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class _Polite:
    def __init__(self) -> None:
        step_aside()

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        return function(*arguments)


def _waiting(cpus: float, gpus: float) -> str:
    import ray

    free, there = ray.available_resources(), ray.cluster_resources()
    kinds = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    wanted = " and ".join(f"{count:g} free {kind}" for kind, count in kinds.items())
    idle = " and ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}s" for kind in kinds)
    return f"waiting for a worker with {wanted}: nobody has reserved {idle}"


def tune(
    trial: Callable[..., None], space: Mapping[str, Any], fixed: Mapping[str, Any], *, trials: int, rungs: int,
    cpus: float, gpus: float, seed: int, stop: Callable[[], bool] = bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run trials by Ray Tune with ASHA on the cluster that is there, or on this machine.

    Args:
        trial: takes what was drawn, what is fixed, a function to report {"value", "rung"} with, and its name.
        space: option → ("log" | "even", low, high) or ("of", values).
        rungs: how often a trial reports, at most.
        stop: whether all is to end now, with what has come out.

    Returns:
        For every trial what was `drawn`, its `run`, its last `value` and `rung` if it came so far, and its `error`.
    """
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    from pipeline.cluster import begin, connect

    handler = signal.getsignal(signal.SIGTERM)
    if not connect(1):
        begin()
    signal.signal(signal.SIGTERM, handler)  # Ray has taken it
    kinds = {"log": ray_tune.loguniform, "even": ray_tune.uniform, "of": ray_tune.choice}

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is for `stop`

    class Told(ray_tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop()

        def __reduce__(self) -> tuple[Any, ...]:  # Tune keeps a copy on the disk
            return ray_tune.stopper.NoopStopper, ()

    def run(drawn: dict[str, Any]) -> None:
        trial(drawn, fixed, ray_tune.report, ray_tune.get_context().get_trial_id())

    results = ray_tune.Tuner(
        ray_tune.with_resources(run, {"CPU": cpus, "GPU": gpus}),
        param_space={name: kinds[how](*drawn) for name, (how, *drawn) in space.items()},
        tune_config=ray_tune.TuneConfig(
            metric="value", mode="max", num_samples=trials, trial_dirname_creator=lambda trial: trial.trial_id,
            search_alg=ray_tune.search.BasicVariantGenerator(random_state=seed),
            scheduler=ASHAScheduler(time_attr="rung", max_t=rungs, grace_period=1, reduction_factor=3),
        ),
        run_config=ray_tune.RunConfig(verbose=0, stop=Told(), storage_path=tempfile.mkdtemp(prefix="ray-tune-")),
    ).fit()  # fmt: skip
    found = []
    for result in results:
        row: dict[str, Any] = {"drawn": dict(result.config or {}), "run": Path(result.path).name}
        if result.metrics and "value" in result.metrics:
            row |= {key: result.metrics[key] for key in ("value", "rung")}
        if result.error:
            row["error"] = str(result.error).strip().splitlines()[-1]
        found.append(row)
    return found


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
