"""What each worker takes of a cluster: equal shares, or what is asked for."""

import pytest
import ray

from pipeline.cluster.machines import TAKES, placement, takes
from pipeline.errors import UserError

NODE = {"CPU": 16.0, "GPU": 2.0, "memory": float(64 << 30)}


@pytest.fixture(autouse=True)
def cluster(monkeypatch):
    """Two machines, one that is lost, and one that is about to be taken away."""
    nodes = [{"NodeID": str(i), "Alive": i != 2, "Resources": NODE} for i in range(4)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"3": 0})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {kind: 2 * amount for kind, amount in NODE.items()})


def test_where_nothing_is_asked_for_workers_share_the_cluster():
    assert placement(2, 2) == ("cuda", 8)
    assert takes(8, cuda=True) == {"CPU": 8, "GPU": 1}
    with pytest.raises(UserError, match="--workers 5: the cluster has 4 GPUs"):
        placement(5, 5)


def test_what_is_asked_for_is_taken(monkeypatch):
    monkeypatch.setenv(TAKES, '{"CPU": 4, "GPU": 0, "memory": 17179869184}')
    assert placement(8, 8) == ("cpu", 4)
    assert takes(4, cuda=False) == {"CPU": 4, "memory": 16 << 30}
    said = "--workers 9: of 4 CPU cores and 16 GiB each, the machines of the cluster could hold 8"
    with pytest.raises(UserError, match=said):
        placement(9, 9)
    monkeypatch.setenv(TAKES, '{"CPU": 1, "GPU": 1, "memory": 0}')
    assert placement(2, 8) == ("cuda", 1)
    assert takes(1, cuda=True) == {"CPU": 1, "GPU": 1}
    with pytest.raises(UserError, match="of 1 CPU core and a GPU each, the machines of the cluster could hold 4"):
        placement(5, 8)
