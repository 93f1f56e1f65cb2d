"""Training on a Ray cluster: the one place that imports Ray for it.

The driver brings a job to the workers (`driver`), which train it and speak to the hub of `pipeline.training.group`
(`worker`); Ray's controller tells the hub which of them come and go (`witness`). Without a cluster, Ray Train runs the
one worker in this process.
"""

from pipeline.cluster.driver import alone, fit
from pipeline.cluster.machines import TAKES, begin, connect, in_job, placement

__all__ = ["TAKES", "alone", "begin", "connect", "fit", "in_job", "placement"]
