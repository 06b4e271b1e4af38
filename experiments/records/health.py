"""What results say of a method's health: figures that need no labels, and how true estimates were.

A ``batch`` line has them under ``health`` where an adapter has such figures (``Adapter.health``).
What a visit to a domain and a whole stream come to is made of these lines.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "FIGURES",
    "batch_health",
    "errors_expected",
    "estimates",
    "in_all",
    "summary_health",
    "visits",
]

WINDOW = 500  # images over which an estimate of accuracy is compared with the truth
FIGURES = (
    "estimated_accuracy",
    "entropy",
    "concentration",
    "agreement",
    "effective_rank",
    "run_length",
    "distance",
)
Row = Mapping[str, Any]


def batch_health(health: Mapping[str, Any], visit: int) -> dict[str, Any]:
    """What a ``batch`` line holds of an adapter's health.

    Args:
        health: Of an adapter after the batch; empty where it has none.
        visit: Number of the visit to a domain.

    Returns:
        An empty object, or one entry ``health``.
    """
    if not health:
        return {}
    kept = {name: float(health[name]) for name in FIGURES}
    said = {"estimator": health["estimator"], "action": health["action"], "visit": visit}
    return {"health": kept | said}


def visits(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The ``health`` lines of a method on a stream, one for each visit to a domain.

    Args:
        rows: ``batch`` lines in stream order; those without health figures are left out.

    Returns:
        The step of the first batch, domain, batches, images, errors, and what `in_all` gives.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if "health" in row:
            groups.setdefault((row["health"]["visit"], row["domain"]), []).append(row)
    return [
        {
            "step": found[0]["step"],
            "domain": domain,
            "visit": visit,
            "batches": len(found),
            "images": sum(row["images"] for row in found),
            "errors": sum(row["errors"] for row in found),
            **in_all(found),
        }
        for (visit, domain), found in groups.items()
    ]


def in_all(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over images of the figures of some batches, and how often a guard did what.

    Args:
        rows: ``batch`` lines with health figures.

    Returns:
        A mean of each of `FIGURES`, NaN where no batch has one; ``estimator``, of the last batch;
        and ``actions``, the number of batches of each.
    """
    images = np.array([row["images"] for row in rows], dtype=float)
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = np.array([row["health"][name] for row in rows], dtype=float)  # null is NaN
        known = np.isfinite(values)
        mean = np.average(values[known], weights=images[known]) if known.any() else math.nan
        found[name] = float(mean)
    found["estimator"] = rows[-1]["health"]["estimator"]
    found["actions"] = dict(Counter(row["health"]["action"] for row in rows))
    return found


def errors_expected(rows: Sequence[Row]) -> list[float] | None:
    """The number of errors so far, after each batch, if estimates of accuracy were true.

    A batch without an estimate has that of the batch before, and those before the first estimate
    have the first one. None where there are no estimates.

    Args:
        rows: ``batch`` lines in stream order.
    """
    known = [row.get("health", {}).get("estimated_accuracy") for row in rows]
    last = next((value for value in known if value is not None), None)
    if last is None:
        return None
    total, found = 0.0, []
    for value, row in zip(known, rows, strict=True):
        last = last if value is None else value
        total += row["images"] * (1 - last)
        found.append(total)
    return found


def estimates(
    batches: Sequence[tuple[str, float, int, int]], window: int = WINDOW
) -> dict[str, dict[str, float]]:
    """How far estimates of accuracy are from the truth, over windows of a stream.

    Args:
        batches: Of each batch with an estimate: the estimator, the estimate, images and errors.
        window: Images of a window, at least; what is left at the end joins the last one.

    Returns:
        By estimator: mean ``estimate``, mean ``truth``, mean absolute error ``mae``, and the number
        of ``windows``.
    """
    found = {}
    for name in dict.fromkeys(row[0] for row in batches):
        rows = np.array([row[1:] for row in batches if row[0] == name])
        share, images, errors = rows.T
        total = images.sum()
        count = max(1, int(total // window))
        places = np.minimum((np.cumsum(images) - images) // window, count - 1).astype(int)
        sizes = np.bincount(places, images, count)
        kept = sizes > 0  # batches larger than a window leave some without any
        estimate = np.bincount(places, share * images, count)[kept] / sizes[kept]
        truth = 1 - np.bincount(places, errors, count)[kept] / sizes[kept]
        found[name] = {
            "estimate": float(estimate.mean()),
            "truth": float(truth.mean()),
            "mae": float(np.abs(estimate - truth).mean()),
            "windows": int(kept.sum()),
        }
    return found


def summary_health(rows: Sequence[Row]) -> dict[str, Any]:
    """What a ``summary`` line holds of a method's health.

    Args:
        rows: ``batch`` lines in stream order.

    Returns:
        An empty object where no batch has health figures, or one entry ``health``: what `in_all`
        gives, and ``estimates``.
    """
    seen = [row for row in rows if "health" in row]
    if not seen:
        return {}
    known = []
    for row in seen:
        health = row["health"]
        if health["estimated_accuracy"] is not None:
            estimate = health["estimator"], health["estimated_accuracy"]
            known.append((*estimate, row["images"], row["errors"]))
    return {"health": in_all(seen) | {"estimates": estimates(known)}}
