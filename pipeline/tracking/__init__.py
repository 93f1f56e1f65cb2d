"""What a run leaves in MLflow: parameters, metrics against images seen, system load, the data set, the backbone.

The driver calls `start_run` (or `resume_run`) and hands the id to the training loop, where one `Tracker` sends what it
is given from a thread of its own. Tracking never delays training, nor stops it unless asked to: while a server does not
answer, entries wait in memory and in a file of the run folder, the spool, and go out in order once it does: with the
run, with the one that continues it, or by

    python -m pipeline.tracking RUN …      # run folders, or folders of them

A metric's step is the number of images seen. Per metric, steps only grow: an entry at or below the last step the store
holds is not sent again. Since a resumed run computes the same values as the uninterrupted one, this leaves no step
twice and none missing, on every kind of store.

A run that heals goes back, and computes other values from there: `Tracker.rewind` says so. What the store holds of the
way that was abandoned stays in its history, older than what is sent for the same steps now; once the run has passed
them, its latest values are those that count. The tag `rewound` tells whereto it went back, and when.
"""

from pipeline.tracking.description import TAGS_VARIABLE
from pipeline.tracking.runs import child_run, end_run, resume_run, start_run
from pipeline.tracking.store import artifacts_of, default_uri, require, store_of
from pipeline.tracking.tracker import Status, Tracker

__all__ = [
    "TAGS_VARIABLE",
    "Status",
    "Tracker",
    "artifacts_of",
    "child_run",
    "default_uri",
    "end_run",
    "require",
    "resume_run",
    "start_run",
    "store_of",
]
