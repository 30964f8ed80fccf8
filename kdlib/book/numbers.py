"""Numbers in prose: plain text to its readers, filled and checked from the record.

An author writes a number and, right after it, an HTML comment that names where it comes from.
No renderer shows the comment. A program fills the number, a test compares it:

    The teacher makes 67.5<!-- ref: teacher/mean --> errors, in the paper 67.
    It beats its student by 10.1<!-- ref: distilled student - teacher/paired difference -->.

The name has up to four parts: [chapter[@profile]/]row[/metric]/statistic[:format]. In a
chapter, its own record is meant; the metric is test_errors, or another metric of the row's
runs, or a number in their recipes, such as learning_rate. A row may also be

    one - another           the difference of two rows
    one ÷ another           the ratio of two rows
    one - another - third   the share of the gap from another to third that one closes
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kdlib import check
from kdlib.book import reference
from kdlib.evaluate import compare, spread

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
# The whole of "67.5 ± 4.2 (30)" too. A hyphen is left alone: "2-3" is a range.
_MARKED = re.compile(
    rf"(?P<text>[−+]?{_NUMBER}%?(?: ± {_NUMBER})?(?: \(\d+\))?|\?)<!-- ref: (?P<name>.+?) -->"
)
_MARKER = re.compile(r"<!-- ref:")
_CHAPTER = re.compile(r"\d\d[a-z]?_\w+(@\w+)?")

Statistic = Callable[..., Any]
OF_A_ROW: dict[str, Statistic] = {
    "mean": lambda row, metric: spread(row, metric).mean,
    "sd": lambda row, metric: spread(row, metric).deviation,
    "count": lambda row, metric: spread(row, metric).count,
    "diverged": lambda row, _: sum(run.metrics["status"] != "ok" for run in row),
    "spread": spread,
    "min": lambda row, metric: float(np.nanmin(_values(row, metric))),
    "median": lambda row, metric: float(np.nanmedian(_values(row, metric))),
    "max": lambda row, metric: float(np.nanmax(_values(row, metric))),
}
OF_A_DIFFERENCE: dict[str, Statistic] = {
    "difference": lambda found: found.difference,
    "half": lambda found: (found.high - found.low) / 2,
    "low": lambda found: found.low,
    "high": lambda found: found.high,
    "count": lambda found: found.count,
}
# Of the differences of two rows' runs, seed by seed.
OF_PAIRS: dict[str, Statistic] = {
    "paired sd": lambda differences: float(np.nanstd(differences, ddof=1)),
    "paired fewer": lambda differences: int((differences < 0).sum()),
    "paired more": lambda differences: int((differences > 0).sum()),
}
# Of the first row's number over the second row's.
OF_A_RATIO: dict[str, Statistic] = {
    "mean": lambda *rows: _ratio("mean", *rows),
    "median": lambda *rows: _ratio("median", *rows),
    "fewer": lambda *rows: 1 - _ratio("mean", *rows),
}
# Of three rows' runs, seed by seed, as a claim's "share" is (kdlib/book/claims.py).
OF_A_GAP: dict[str, Statistic] = {
    "paired share": lambda closed, gap: float(np.nanmean(closed / np.where(gap, gap, np.nan))),
}


def fill(text: str, chapter: str = "") -> str:
    """The text with each marked number as it is recorded; chapter: whose text it is.

    Raises ValueError for a marker without a number before it ("?" will do), or with a name
    of which nothing is recorded.
    """

    def number(match: re.Match[str]) -> str:
        return f"{value(match['name'], chapter)}<!-- ref: {match['name']} -->"

    filled, found = _MARKED.subn(number, text)
    if found != len(_MARKER.findall(text)):
        # What is left without the good ones begins with the first that has no number.
        stray = _MARKER.search(_MARKED.sub("", text))
        place = _MARKED.sub("", text)[stray.start() :][:60] if stray else ""
        raise ValueError(f"{place!r} has no number before it: write one, or a ?")
    return filled


def value(name: str, chapter: str = "") -> str:
    """What a marker's name stands for, formatted. Raises ValueError if nothing is recorded."""
    *parts, statistic = name.split("/")
    # No row of a record is named like a chapter.
    if parts and _CHAPTER.fullmatch(parts[0]):
        chapter = parts.pop(0)
    row, metric = (*parts, "test_errors")[:2] if parts else ("", "")
    statistic, _, form = statistic.partition(":")
    try:
        found = _statistic(_rows(chapter), row, metric, statistic)
    except KeyError as error:
        check.refuse(
            f"{error} is not known: the number's name",
            name,
            "[chapter/]row[/metric]/statistic\nwith a row of: "
            + ("; ".join(_rows(chapter)) or f"nothing, for nothing is recorded of {chapter!r}")
            + f"\nand a statistic of: {', '.join(_kinds(row))}",
        )
    if not isinstance(found, int | float):
        return str(found)
    # The errors of one network are counted; a mean has a decimal, even where that is 0.
    counted = isinstance(found, int) or (statistic in ("min", "median", "max") and found % 1 == 0)
    default = ",.0f" if counted else ".1f"
    return format(found, form or default).replace("-", "−")


def _statistic(rows: dict[str, Any], row: str, metric: str, statistic: str) -> Any:
    """Raises KeyError for what is not recorded or not known."""
    if " ÷ " in row:
        return OF_A_RATIO[statistic](*(rows[name] for name in row.split(" ÷ ")), metric)
    named = [rows[name] for name in row.split(" - ")]
    if len(named) == 1:
        return OF_A_ROW[statistic](*named, metric)
    if len(named) == 3:
        one, start, end = named
        closed, gap = _differences(start, one, metric), _differences(start, end, metric)
        return OF_A_GAP[statistic](closed, gap)
    one, other = named
    if statistic in OF_PAIRS:
        return OF_PAIRS[statistic](_differences(one, other, metric))
    kind = statistic.removeprefix("paired ")
    return OF_A_DIFFERENCE[kind](compare(one, other, paired=kind != statistic, metric=metric))


def _kinds(row: str) -> list[str]:
    """The statistics that are known of such a row."""
    if " ÷ " in row:
        return list(OF_A_RATIO)
    paired = [f"paired {kind}" for kind in OF_A_DIFFERENCE]
    by_rows = {1: OF_A_ROW, 2: [*OF_A_DIFFERENCE, *paired, *OF_PAIRS], 3: OF_A_GAP}
    return list(by_rows.get(len(row.split(" - ")), ()))


def _ratio(statistic: str, one: Any, other: Any, metric: str) -> float:
    return float(OF_A_ROW[statistic](one, metric) / OF_A_ROW[statistic](other, metric))


def _differences(one: Any, other: Any, metric: str) -> Any:
    """Of the runs, seed by seed; nan where either diverged."""
    compare(one, other, paired=True, metric=metric)  # refuses rows that are no pairs
    return np.subtract(_values(one, metric), _values(other, metric))


def _values(row: Any, metric: str) -> list[float]:
    """The metric of each run; nan for one that diverged."""
    metrics = [run.metrics for run in row]
    return [each[metric] if each["status"] == "ok" else math.nan for each in metrics]


# A record is megabytes of JSON, and a page has dozens of numbers.
@functools.cache
def _rows(chapter: str) -> dict[str, list[reference.Recorded]]:
    """A chapter's recorded results; chapter@profile: those of another profile than full."""
    name, _, profile = chapter.partition("@")
    rows = reference.results(name, profile or "full") or {}
    return {key: [_with_settings(run) for run in row] for key, row in rows.items()}


def _with_settings(run: reference.Recorded) -> reference.Recorded:
    """The run with its recipe's numbers among its metrics."""
    if run.recipe is None:
        return run
    settings = {
        field.name: getattr(run.recipe, field.name) for field in dataclasses.fields(run.recipe)
    }
    kept = {name: each for name, each in settings.items() if isinstance(each, int | float)}
    return dataclasses.replace(run, metrics=kept | run.metrics)
