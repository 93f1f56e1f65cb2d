"""What a run says of itself in MLflow's table and on its page: tags, parameters, the note; none with credentials."""

import getpass
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pipeline.redaction import SECRET_NAME, redact
from pipeline.tracking.store import accepted

log = logging.getLogger(__name__)

PARAM_LENGTH = 500  # what servers of every version store; the whole configuration is the artifact config.yaml
TAG_LENGTH = 5000
TAGS_VARIABLE = "SSL_RUN_TAGS"
"""Environment variable with more tags for every run begun, as a JSON object: a job's name and firing."""


class DatasetInput(TypedDict):
    """The training images as MLflow lists them; `digest` is the packed file's fingerprint, the last two are counts."""

    name: str
    digest: str
    path: str
    images: int
    classes: int


def run_tags(given: Mapping[str, Any], dataset: DatasetInput | None, command: Sequence[str]) -> dict[str, str]:
    """All tags of a run: those given, those of the environment, and what MLflow shows on the run's page.

    Args:
        given: by the caller; they win over the environment's.
        dataset: the training images.
        command: what was typed, the interpreter first.
    """
    tags = plain_tags({**_tags_of_the_environment(), **given})
    tags.setdefault("kind", "pretraining")
    tags.setdefault("commit", _commit())
    if dataset is not None:
        tags.setdefault("images", f"{dataset['images']}")
    return {key: value for key, value in tags.items() if value} | {
        "mlflow.user": user(),
        "mlflow.source.name": _entry_point(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": tags["commit"],
        "mlflow.note.content": _note(tags, dataset, command),
    }


def plain_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as text that a store takes; what is None is left out."""
    return {key: redact(str(value))[:TAG_LENGTH] for key, value in tags.items() if value is not None}


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters under dotted names, long values cut."""
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
            continue
        text = "***" if value and re.fullmatch(SECRET_NAME, str(key), re.IGNORECASE) else redact(str(value))
        found[accepted(f"{prefix}{key}")] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return found


def user() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"


def _tags_of_the_environment() -> dict[str, Any]:
    try:
        given = json.loads(os.environ.get(TAGS_VARIABLE) or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        log.warning("%s is no JSON object, so its tags are left out.", TAGS_VARIABLE)
        return {}
    return given


def _note(tags: Mapping[str, str], dataset: DatasetInput | None, command: Sequence[str]) -> str:
    parts = [tags[key] for key in ("backbone", "objective") if key in tags]
    if dataset is not None:
        parts.append(f"{redact(dataset['name'])}, {dataset['images']:,} images, fingerprint {dataset['digest'][:12]}")
    typed = redact(shlex.join(["python", *command[1:]]))
    return f"{' · '.join(parts)}\n\n```\n{typed}\n```"[:TAG_LENGTH]


def _entry_point(command: Sequence[str]) -> str:
    """`pipeline.pretrain` of `python -m pipeline.pretrain …`, else the script's name."""
    if "-m" in command[:-1]:
        return command[list(command).index("-m") + 1]
    return Path(command[1]).name if len(command) > 1 else "python"


def _commit() -> str:
    """The checked-out commit of this code, with `+` where files differ from it; empty outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        tracked = [*git, "ls-files", "--error-unmatch", here.name]  # installed, it may lie within another project's
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode == 1
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout[:12] + ("+" if changed else "")
