"""Every objective learns: 512 steps from its own recipe lift k-NN on generated images above the untrained backbone's.

The rule: k-NN on colour, what the images are labelled by, lies at least two standard errors above the floor. For masked
modelling linear accuracy will do: it rises first (README's table).
"""

from pathlib import Path

import pytest

import objectives
from pipeline.learns import BACKBONES, SCORES, Cell, errors_above

pytestmark = pytest.mark.slow

CELLS = [(o, b) for o in objectives.NAMES for b in BACKBONES]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that one run of DINO serves as teacher and as the start of Gram anchoring."""
    return tmp_path_factory.mktemp("learns")


@pytest.mark.parametrize(("objective", "backbone"), CELLS)
def test_k_nn_rises_above_its_floor(objective: str, backbone: str, storage: Path) -> None:
    cell = Cell(objective, backbone, seed=0)
    assert cell.train(storage, "--cache", str(storage / "cache"), "--debug") == 0
    summary = cell.summary(storage)
    assert summary is not None
    counted = SCORES.values() if objectives.objective(objective).family == "masked modelling" else ["knn_top1"]
    found = {score: (summary[score], summary["untrained"][score]) for score in counted}
    assert max(errors_above(summary, score) for score in counted) >= 2, f"(trained, untrained): {found}"
