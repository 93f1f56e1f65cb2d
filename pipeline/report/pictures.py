"""All pictures of a report, in their order."""

from collections.abc import Callable, Iterator, Sequence

from matplotlib import rc_context

from pipeline.report import charts
from pipeline.report.contest import Contest
from pipeline.report.drawing import STYLE, Picture
from pipeline.report.sights import sights

Drawing = Callable[[Contest], Iterator[Picture]]
DRAWINGS: Sequence[Drawing] = (
    *(charts.accuracy, charts.degradation, charts.low_shot, charts.robustness, charts.factors, charts.layerwise),
    *(charts.similarity, charts.depth, sights, charts.confusions, charts.cost, charts.trustworthy),
)


def pictures(contest: Contest) -> Iterator[Picture]:
    """Every picture that the contest has numbers for."""
    for draw in DRAWINGS:
        with rc_context({**STYLE, "svg.hashsalt": draw.__name__}):
            yield from draw(contest)
