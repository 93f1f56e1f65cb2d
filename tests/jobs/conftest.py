"""One Ray cluster for all tests of jobs that need one."""

from collections.abc import Iterator

import pytest
from job_toys import Cluster, cluster_of


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("home")) as running:
        yield running
