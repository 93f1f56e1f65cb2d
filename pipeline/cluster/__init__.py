"""Training and evaluation on a Ray cluster: the one place that imports Ray for them.

The driver brings a job to the workers (`driver`), which train it and speak to the hub of `pipeline.training.group`
(`worker`); Ray's controller tells the hub which of them come and go (`witness`). Without a cluster, Ray Train runs the
one worker in this process. An evaluation's passes over images are shared out by `looking`.
"""

from pipeline.cluster.driver import alone, fit
from pipeline.cluster.looking import looking
from pipeline.cluster.machines import TAKES, address, begin, connect, in_job, join, placement, side_by_side

__all__ = [
    "TAKES",
    "address",
    "alone",
    "begin",
    "connect",
    "fit",
    "in_job",
    "join",
    "looking",
    "placement",
    "side_by_side",
]
