"""MLflow, and the packed images, fail under real runs; `python -m tests.chaos` does the same and prints the costs."""

import pytest

from tests.chaos import data_faults, tracking_faults
from tests.chaos.runs import Place, Row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("fault", [*tracking_faults.FAULTS, *data_faults.FAULTS], ids=lambda fault: fault.__name__)
def test_it_is_survived(fault, tmp_path):
    assert isinstance(fault(Place(tmp_path)), Row)
