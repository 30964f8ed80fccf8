"""Claims: each sentence that matters, listed once, with what decides it and its verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML

from kdlib import check, evaluate
from kdlib.book import reference

HOLDS, FAILS, CLOSE, UNTESTED = "holds", "does not hold", "too close to call", "not tested here"
SOURCES = "ours", "paper", "article", "tutorial", "folklore"
# How many rows each form of a test takes, and the option that it needs.
FORMS = {"fewer": 2, "more": 2, "alike": 2, "share": 3, "every": 2, "apart": 2, "plausible": 2}
OPTIONS = {"alike": "margin", "share": "above"}


@dataclass(frozen=True)
class Claim:
    """A sentence and the verdict that the prose gives it, by a form of test or none for a reason.

    rows: what the form compares: names of rows, lists of them, or a number for the second;
    under "reason", a text.
    """

    form: str
    rows: Sequence[Any]
    sentence: str
    verdict: str
    source: str = "ours"
    margin: float | None = None
    above: float = 0.0


@dataclass(frozen=True)
class Figure:
    """Claims whose comparisons are corrected together, by name.

    paired: the reason why rows are compared seed by seed; "" if they are not.
    note: what the intervals leave out.
    """

    claims: Mapping[str, Claim]
    paired: str = ""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """What results give for a claim: a verdict, and the numbers behind it."""

    verdict: str
    shown: str


def read(folder: Path | None = None) -> dict[str, dict[str, Figure]]:
    """chapter -> figure -> claims, from the files in book/claims or another folder like it.

    Raises ValueError, which names the claim, for a key or a value that is not known.
    """
    import yaml  # comes with the book, not with the library

    files = sorted((folder or reference.folder().parent / "claims").glob("*.yml"))
    chapters: dict[str, dict[str, Any]] = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files
    }
    for figures in chapters.values():
        for name, figure in figures.items():
            claims = {key: _claim(f"claim {key}", entry) for key, entry in figure["claims"].items()}
            figures[name] = Figure(**figure | {"claims": claims})
    return chapters


def _claim(name: str, entry: Mapping[str, Any]) -> Claim:
    form = next((key for key in entry if key in FORMS), "reason")
    wanted = {"sentence", "verdict", form, OPTIONS.get(form, form)}
    if entry.keys() - {"source"} != wanted:
        check.refuse(f"{name}: the list of keys", list(entry), ", ".join(sorted(wanted)))
    claim = Claim(form, entry[form], **{key: entry[key] for key in entry if key != form})
    if form in FORMS and len(claim.rows) != FORMS[form]:
        check.refuse(f"{name}: {form}", claim.rows, f"a list of {FORMS[form]}")
    check.value(f"{name}: source", claim.source.split(" §")[0], check.one_of(*SOURCES))
    verdicts = (HOLDS, FAILS, CLOSE) if form in FORMS else (UNTESTED,)
    check.value(f"{name}: verdict", claim.verdict, check.one_of(*verdicts))
    return claim


def findings(figure: Figure, rows: reference.Rows) -> dict[str, Finding]:
    """What results give for each claim of a figure, by the book's one rule.

    rows: name -> runs, one per seed. A claim whose rows are not all there is not tested.
    """
    found: dict[str, Finding] = {}
    compared: dict[str, list[evaluate.Comparison]] = {}
    for name, claim in figure.claims.items():
        try:
            if claim.form == "reason":
                found[name] = Finding(UNTESTED, str(claim.rows))
            elif claim.form in ("every", "apart", "plausible"):
                found[name] = _observed(claim, rows)
            else:
                compared[name] = _compared(claim, figure, rows)
        except KeyError as missing:
            found[name] = Finding(UNTESTED, f"no row {missing} in this run")
    # A margin is declared, not tested, so comparisons with one need no correction.
    tested = {name: each for name, each in compared.items() if each[0].margin is None}
    corrected = iter(evaluate.holm([one for each in tested.values() for one in each]))
    compared |= {name: [next(corrected) for _ in each] for name, each in tested.items()}
    found |= {name: _judged(figure.claims[name], each) for name, each in compared.items()}
    return {name: found[name] for name in figure.claims}


def _values(rows: reference.Rows, name: str) -> dict[Any, float]:
    """A row by seed, nan where a run diverged."""
    row, _, metric = name.partition(" | ")
    runs: Any = rows[row]
    return {
        (run.recipe or run).seed: run.metrics[metric or "test_errors"]
        if run.metrics["status"] == "ok"
        else math.nan
        for run in runs
    }


def _pair(rows: reference.Rows, first: str, second: str | float) -> list[dict[Any, float]]:
    """Two rows, reduced to the seeds that both have; a number stands for every seed."""
    a = _values(rows, first)
    b = _values(rows, second) if isinstance(second, str) else dict.fromkeys(a, float(second))
    return [{seed: row[seed] for seed in a if seed in b} for row in (a, b)]


def _observed(claim: Claim, rows: reference.Rows) -> Finding:
    """What single runs decide: every pair, no overlap, room for one more run."""
    pairs = zip(*(row.values() for row in _pair(rows, *claim.rows)), strict=True)
    sound = [pair for pair in pairs if not math.isnan(sum(pair))]
    if len(sound) < evaluate.FEWEST:
        return Finding(CLOSE, f"{len(sound)} runs")
    a, b = zip(*sound, strict=True)
    if claim.form == "every":
        wins = sum(x < y for x, y in sound)
        holds, shown = wins == len(sound), f"in {wins} of {len(sound)} pairs"
    elif claim.form == "apart":
        shown = f"{min(a):g} to {max(a):g} against {min(b):g} to {max(b):g}"
        holds = max(a) < min(b)
    else:
        # The interval for one more run: that of the mean, times the square root of n + 1.
        about = evaluate.compare(a, b, paired=True)
        reach = (about.high - about.low) / 2 * math.sqrt(len(a) + 1)
        low, high = (about.difference + b[0] + x for x in (-reach, reach))
        holds, shown = low <= b[0] <= high, f"one more run: {low:.0f} to {high:.0f}"
    return Finding(HOLDS if holds else FAILS, shown)


def _compared(claim: Claim, figure: Figure, rows: reference.Rows) -> list[evaluate.Comparison]:
    """Each of the first rows with each of the second ones; a share with its bound."""
    if claim.form == "share":
        student, plain, teacher = (_values(rows, name) for name in claim.rows)
        gaps = {s: plain[s] - teacher[s] for s in student.keys() & plain.keys() & teacher.keys()}
        # Without a gap there is no share of it.
        share = {s: (plain[s] - student[s]) / (gap or math.nan) for s, gap in gaps.items()}
        return [evaluate.compare(share, dict.fromkeys(share, claim.above), paired=True)]
    results = []
    for pair in product(*(names if isinstance(names, list) else [names] for names in claim.rows)):
        paired = bool(figure.paired) or not isinstance(pair[1], str)
        a, b = _pair(rows, *pair) if paired else (_values(rows, name) for name in pair)
        results.append(evaluate.compare(a, b, paired=paired, margin=claim.margin))
    return results


def _judged(claim: Claim, comparisons: Sequence[evaluate.Comparison]) -> Finding:
    """Holds if every comparison supports the claim, and does not if one contradicts it."""
    # The weakest support is shown: for "alike" the clearest difference, else the least clear.
    sign = 1 if claim.form == "alike" else -1
    weakest = min(comparisons, key=lambda one: (_supports(claim, one), sign * one.p))
    ends = {name: getattr(weakest, name) + claim.above for name in ("difference", "low", "high")}
    difference, interval, over, _ = replace(weakest, **ends).as_row().values()
    if isinstance(claim.rows[1], int | float):
        over = over.replace("pairs", "runs")
    several = f"weakest of {len(comparisons)}: " * (len(comparisons) > 1)
    verdict = {1: HOLDS, 0: CLOSE, -1: FAILS}[_supports(claim, weakest)]
    return Finding(verdict, f"{several}{difference} {interval}, {over}")


def _supports(claim: Claim, comparison: evaluate.Comparison) -> int:
    """1 if a comparison supports the claim, -1 if it contradicts it, 0 if it is too close."""
    wanted = "more" if claim.form == "share" else claim.form
    if comparison.verdict in (wanted, CLOSE):
        return int(comparison.verdict == wanted)
    # A clear difference that may still be inside the margin does not contradict "alike".
    margin = comparison.margin or 0.0
    return -1 if comparison.low > margin or comparison.high < -margin else 0


def table(chapter: str, rows: reference.Rows, measures: reference.Measures | None = None) -> HTML:
    """A chapter's claims: the reference run, this run by the same tests, whether they agree.

    rows, measures: this run's, as for `reference.keep`.
    """
    ours = dict(rows)
    for name, more in (measures or {}).items():
        ours[name] = [
            reference.Recorded(run.recipe, run.metrics | {m: more[m][at] for m in more}, 0.0, {})
            for at, run in enumerate(rows[name])
        ]
    recorded, lines, notes = reference.results(chapter) or {}, [], ""
    for name, figure in read()[chapter].items():
        there, here = findings(figure, recorded), findings(figure, ours)
        for key, claim in figure.claims.items():
            both = {there[key].verdict, here[key].verdict}
            agree = "–" if both & {CLOSE, UNTESTED} else "yes" if len(both) == 1 else "no"
            cells = (f"<b>{x.verdict}</b><br>{escape(x.shown)}" for x in (there[key], here[key]))
            lines.append([f"{escape(claim.sentence)} ({claim.source})", *cells, agree])
        if figure.paired or figure.note:
            how = f"paired, because {figure.paired}" if figure.paired else "not paired."
            notes += f"<p>Comparisons of {name}: {escape(f'{how} {figure.note}')}</p>"
    return HTML(_html(["claim", "reference run", "this run", "agree"], lines) + notes)  # type: ignore[no-untyped-call]


def page() -> str:
    """All claims of the book in one HTML table, with what the reference runs give."""
    lines = []
    for chapter, figures in read().items():
        recorded = reference.results(chapter) or {}
        for figure in figures.values():
            for key, finding in findings(figure, recorded).items():
                claim = figure.claims[key]
                link = f'<a href="{chapter}.html#claim-{key}">{escape(claim.sentence)}</a>'
                rest = chapter.split("_")[0].lstrip("0"), finding.verdict, escape(finding.shown)
                lines.append([link, claim.source, *rest])
    return _html(["claim", "source", "chapter", "verdict", "reference run"], lines)


def _html(head: list[str], lines: list[list[str]]) -> str:
    with pd.option_context("display.max_colwidth", None):
        frame = pd.DataFrame(lines, columns=head)
        html = frame.to_html(
            index=False, escape=False, border=0, justify="left", classes="kd-claims"
        )
    # JupyterLab sets a table's cells to the right, which suits numbers, not sentences.
    return html.replace("<td>", '<td style="text-align: left">')
