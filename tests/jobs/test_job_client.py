"""What a command about jobs says where the cluster, or a node of it, is gone."""

import requests
from job_toys import python

from jobs import cluster as jobs_cluster
from jobs import list as jobs_list
from jobs import logs, stop
from jobs.cluster import Client


class Details:
    """A record of Ray's."""

    status, message, start_time, end_time, error_type = "RUNNING", "", 1, None, None

    def __init__(self, cell: str) -> None:
        self.submission_id, self.metadata = f"weekly-1-{cell}", {"job": "weekly", "firing": "1", "cell": cell}


class Api:
    """Knows two submissions, of which the first lost its node; away: whether it has been lost since."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away

    def list_jobs(self) -> list[Details]:
        if self.away:
            raise requests.exceptions.ConnectionError("HTTPConnectionPool(host='head', port=8265): refused")
        return [Details("cnn"), Details("vit")]

    def get_job_logs(self, submission: str) -> str:
        if submission == "weekly-1-cnn":
            raise RuntimeError("Request failed with status code 500: Traceback (most recent call last):\n  …\nlost")
        return "it trains\n"

    def stop_job(self, submission: str) -> None:
        raise RuntimeError(
            "Request failed with status code 500: Traceback (most recent call last):\n  …\nno control store"
        )


def connected(monkeypatch, **options: bool) -> None:
    def connect(self: Client, address: str | None = None) -> None:
        self.api = Api(**options)

    monkeypatch.setattr(jobs_cluster.Client, "__init__", connect)


def test_a_log_that_is_gone_is_said_and_the_others_are_shown(monkeypatch, capsys):
    connected(monkeypatch)
    assert logs.main(["weekly"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "--- weekly-1-cnn\n--- weekly-1-vit\nit trains\n"
    assert shown.err == "weekly-1-cnn: its log is gone, as where its node is\n"


def test_a_cluster_that_answers_no_more_or_with_an_error_is_one_sentence(monkeypatch, capsys):
    connected(monkeypatch)
    assert stop.main(["weekly"]) == 2
    assert capsys.readouterr().err == "error: the cluster's job API answers with an error (no control store)\n"
    connected(monkeypatch, away=True)
    for command, words in ((jobs_list.main, []), (logs.main, ["weekly"]), (stop.main, ["weekly"])):
        assert command(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the cluster's job API answers no more (HTTPConnectionPool")


def test_an_address_without_http_is_refused_at_once(tmp_path):
    done = python("-m", "jobs.list", "--address", "head:8265", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --address head:8265: must be that of the job API, as in http://HOST:8265\n"
