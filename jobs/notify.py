"""Telling people how a job went: an HTTP POST, a command. Neither can hold a job up or make it fail."""

import dataclasses
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.job import Event, Notify
from pipeline.redaction import redact

SECONDS = 20
WAITS = (2.0, 10.0)
"""Seconds before the second and the third try at a webhook: what hinders one may pass."""
PASSING = (408, 425, 429)
"""What a web server answers, besides 500 and more, where the same request may be taken later."""
LOGGED = "job "
"""How the line begins that the log has of every event, whoever wants to be told of it."""


@dataclass(frozen=True)
class News:
    """What is told: `text` is one sentence for people; `results` are those numbers of summary.json that are known."""

    event: Event
    job: str
    firing: str
    cell: str
    text: str
    run: str
    seconds: float
    results: Mapping[str, Any]


def tell(notify: Notify, news: News) -> None:
    """Send news to whoever the job names, if it wants this event; what fails is said on standard error."""
    news = dataclasses.replace(news, text=redact(news.text).encode(errors="replace").decode())
    print(f"{LOGGED}{news.event}: {news.text}", flush=True)
    if news.event not in notify.on:
        return
    if notify.webhook:
        _post(notify.webhook, news)
    if notify.command:
        _call(notify.command, news)


def _post(webhook: str, news: News) -> None:
    """POST the news as JSON; services that show messages find theirs under "text"."""
    address = (os.environ.get(webhook[1:], "") if webhook.startswith("$") else webhook).strip()
    if not re.fullmatch(r"https?://\S+", address):
        # The address is a secret where it comes from a variable.
        why = "holds no http(s) address" if address else "is not set"
        print(f"notification: {webhook} {why}, so nobody is told", file=sys.stderr, flush=True)
        return
    body = json.dumps(asdict(news), ensure_ascii=False).encode()
    for wait in (*WAITS, None):
        try:
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=SECONDS):
                return
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = str(error) if isinstance(error, OSError) else type(error).__name__  # which may hold the address
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in PASSING
            if wait is None or refused or isinstance(error, ValueError):
                break
            time.sleep(wait)
    print(f"notification: the webhook did not take it ({redact(why)})", file=sys.stderr, flush=True)


def _call(command: str, news: News) -> None:
    """Run the command in bash. What is told stands in JOB_EVENT, JOB_TEXT …, so that nothing needs quoting."""
    told = {f"JOB_{key.upper()}": str(value) for key, value in asdict(news).items() if key != "results"}
    told |= {"JOB_RESULTS": json.dumps(news.results)}
    try:
        done = subprocess.run(["bash", "-c", command], env={**os.environ, **told}, timeout=SECONDS, check=False)
        if done.returncode:
            print(f"notification: the command ended with status {done.returncode}", file=sys.stderr, flush=True)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"notification: the command failed ({error})", file=sys.stderr, flush=True)
