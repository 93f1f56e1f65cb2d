"""`numbers.json`: everything that a report says, but for its tensors, as plain data."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.evaluate import confusions
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.report import verdict
from pipeline.report.contest import Contest


def as_json(contest: Contest) -> dict[str, Any]:
    """A contest, its verdict with the numbers, among `claims`, of those that each sentence stands on, and what ranks it
    without labels; NaN becomes None."""

    def plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}

    tested = verdict.claims(contest)
    return {
        "verdict": [
            {"sentence": text, "claims": [tested.index(claim) for claim in evidence]}
            for text, evidence in verdict.with_evidence(contest, tested)
        ],
        "unfair": verdict.unfair(contest),
        "claims": [
            plain(
                {
                    "first": claim.first,
                    "second": claim.second,
                    "what": claim.what,
                    "floor": claim.floor,
                    **claim.difference._asdict(),
                    "p_adjusted": claim.p,
                    "significant": claim.significant,
                }
            )
            for claim in tested
        ],
        "trust": [
            plain(
                {
                    "score": one.score,
                    "accuracy": one.accuracy,
                    "runs": one.runs,
                    "rank_correlation": one.correlation.rho,
                    "low": one.correlation.low,
                    "high": one.correlation.high,
                    "p_adjusted": one.correlation.p,
                }
            )
            for one in verdict.trust(contest)
        ],
        "data": contest.data,
        "note": contest.note,
        "classes": list(contest.classes),
        "labels": contest.table.address if contest.table else None,
        "train_images": contest.train_images,
        "val_images": contest.val_images,
        "fingerprints": list(contest.fingerprints),
        "copies": [list(pair) for pair in contest.copies],
        "lacking": contest.lacking,
        "protocols": {name: PROTOCOLS[name].headline for name in contest.protocols},
        "seed": contest.seed,
        "limit": contest.limit,
        "epochs": contest.epochs,
        "seconds": dict(contest.seconds),
        "entries": [
            {
                "name": one.name,
                "run": one.run,
                "family": one.family,
                "cost": vars(one.cost),
                "receptive_field": one.field,
                "pretrained_on": one.met.count,
                "trained": plain(one.trained.numbers),
                "choices": dict(one.trained.choices),
                "confusions": confusions(one.trained, contest.classes),
                "untrained": plain(one.untrained.numbers),
                "pixels": plain(one.pixels.numbers),
            }
            for one in contest.entries
        ],
    }
