"""A record as Markdown and as a figure: every number on the page is computed here."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.programme import Record, noise
from benchmarks.systems import PEERS
from kdlib import files

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGES = FOLDER.parent / "book" / "benchmark"
DEVIATIONS = 4  # further than this from kdlib's mean, errors are called unequal
ORDERED = {"cpu": "make bench", "cuda": "make bench-gpu"}
Row = dict[str, Any]


def render(results: Path = RESULTS, pages: Path = PAGES) -> None:
    """Write a page part for each device, and a figure where its record is there."""
    for device in ORDERED:
        path = results / f"{device}.json"
        record = json.loads(path.read_text()) if path.is_file() else None
        files.put(pages / f"{device}.md", page(record, device).encode())
        if record is not None:
            files.put(pages / f"{device}.svg", figure(record).encode())
    path = results / "torture.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    files.put(pages / "torture.md", torture(record).encode())


def torture(record: Record | None) -> str:
    """The Markdown of a torture: what was tried, and how it ended."""
    if record is None:
        return "Not tried yet; `make torture` does it.\n"
    names = ("tried", "survived", "lost", "wrong")
    rows = [(row["ordeal"], *(str(row[name]) for name in names)) for row in record["rows"]]
    total = ("in all", *(str(sum(row[name] for row in record["rows"])) for name in names))
    told = (
        f"Tried {record['date'][:10]} on {record['machine']}, in {record['seconds'] / 60:.0f} "
        f"minutes, with TORTURE_SEED={record['seed']}. The small disks are {record['disks']}."
    )
    return f"{told}\n\n{_table(('what', *names), [*rows, total])}\n"


def page(record: Record | None, device: str) -> str:
    """The Markdown of one device."""
    if record is None:
        return f"Not measured yet; `{ORDERED[device]}` does it.\n"
    parts = [_measured_on(record), *_targets(record)]
    for comparison in record["comparisons"]:
        parts += [f"### {_name(comparison['task'])}", _times(comparison)]
    parts += _sweeps(record)
    parts += ["### How close to the limit", _limits(record)]
    if any("peak_bytes" in row["note"] for row in _all_rows(record)):
        parts += ["### Memory", _memory(record)]
    parts += ["### Time of a run as the stack grows", _figure_block(record, device)]
    parts += _troubles(record)
    return "\n\n".join(parts) + "\n"


def unmet(record: Record) -> list[str]:
    """What failed, or is not comparable: reasons to end with an error."""
    failed = [f"{row['label']}: {row['failure']}" for row in _all_rows(record) if row["failure"]]
    for comparison in record["comparisons"]:
        for row in comparison["rows"]:
            if not row["failure"] and not _equal(row, comparison):
                failed.append(
                    f"{_name(comparison['task'])}, {row['label']}: {_errors(row, comparison)} test "
                    f"errors, expected about {noise(comparison)[0]:.0f}: not the same result"
                )
    return failed


def _measured_on(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    device = f"{machine['gpu']}; " if machine["gpu"] else ""
    used = ", ".join(f"{name} {number}" for name, number in versions.items() if number != "absent")
    lines = [
        f"Measured {record['date'][:10]} on: {device}{machine['processor']}, "
        f"{machine['cores']} cores, {record['threads']} threads per process, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; {used}. "
        f"Load average before: {record['load_before']:.2f}. "
        f"It took {record['seconds'] / 60:.1f} minutes."
    ]
    if record["quick"]:
        lines.append("**A trial with `--quick`: too short to mean anything.**")
    return "\n\n".join(lines)


def _targets(record: Record) -> list[str]:
    """The targets, and what was measured."""
    rows = list(_gpu_aims(record) if record["machine"]["gpu"] else _cpu_aims(record))
    if not rows:
        return []
    head = ("task", "target", "measured", "met")
    return ["### Targets", _table(head, [(*row[:3], _yes(row[3])) for row in rows])]


def _cpu_aims(record: Record) -> Iterable[tuple[str, str, str, bool]]:
    """Of each task: kdlib with one thread and with two, where its result equals the others'."""
    for comparison in record["comparisons"]:
        rows = [row for row in comparison["rows"] if not row["failure"]]
        peers = [row for row in rows if _is_peer(row)]
        own = [row for row in rows if row["system"].startswith("kdlib") and _equal(row, comparison)]
        one = [row for row in own if row.get("threads") == 1]
        two = [row for row in own if row.get("threads") != 1 and row["runs"] <= 2]
        if len(peers) < len(PEERS) or not two:
            continue  # the list of failures tells
        name, ours, fastest = _name(comparison["task"]), min(two, key=_step), min(peers, key=_step)
        for aim, how, chosen in (
            (2.4, "with one thread", one),
            (4, "with two threads or two runs side by side", two),
        ):
            if chosen:
                best = min(chosen, key=_step)
                times = peers[0]["step_seconds"] / _step(best)
                measured = f"{_times_of(times)} ({best['label']})"
                yield name, f"{aim} × the article’s loop, {how}", measured, times >= aim
        lead = _step(fastest) / _step(ours)
        yield (
            name,
            "faster than the fastest peer",
            f"{_times_of(lead)} ({fastest['label']})",
            lead > 1,
        )
        mean, spread, _ = noise(comparison)
        allowed = f"all within {mean:.0f} ± {DEVIATIONS * spread:.0f}"
        yield name, "compatible results", allowed, all(_equal(row, comparison) for row in peers)


def _gpu_aims(record: Record) -> Iterable[tuple[str, str, str, bool]]:
    for comparison in record["comparisons"]:
        name = _name(comparison["task"])
        article = [
            row["step_seconds"]
            for row in comparison["rows"]
            if row["system"] == "article" and not row["failure"]
        ]
        for row in comparison["rows"]:
            if row["runs"] < 2 or not row["cached"] or row["failure"]:
                continue
            for seconds in article:
                times = seconds / row["step_seconds"]
                asked = f"{row['label']}: 100 × the article’s loop, per run"
                yield name, asked, _times_of(times), times >= 100
            share = _bound(row)[2]
            yield name, f"{row['label']}: 40 % of the limit", f"{share:.0%}", share >= 0.4
    most = [row for row in _all_rows(record) if "peak_bytes" in row["note"]]
    if most:
        worst = max(row["note"]["peak_bytes"] / row["planned_bytes"] for row in most)
        yield (
            "all runs, alone and stacked",
            "never more memory than planned",
            f"{worst:.0%} of it",
            worst <= 1,
        )


def _times(comparison: Record) -> str:
    """The systems of one task: seconds per epoch, and compared with the article's loop."""
    batch = comparison["task"]["batch_size"]
    article = _by_label(comparison).get("the article’s loop", {}).get("step_seconds", math.nan)
    lines = []
    for row in comparison["rows"]:
        if row["failure"]:
            lines.append((row["label"], "failed", "", "", ""))
            continue
        seconds = row["step_seconds"]
        low, high = (f(row["seconds"]) / row["every"] / row["runs"] for f in (min, max))
        lines.append(
            (
                row["label"],
                _three(seconds * 60_000 / batch),
                f"{_three(1000 * seconds)} ({_three(1000 * low)}–{_three(1000 * high)})",
                _times_of(article / seconds),
                _errors(row, comparison),
            )
        )
    head = (
        "system",
        "s per epoch and run",
        "ms per step (range)",
        "speed (article’s loop = 1)",
        "test errors",
    )
    row = comparison["rows"][0]
    notes = [
        f"{len(row['seconds'])} turns of {row['every']} steps each after a warm-up turn; "
        f"{row['steps']} steps in all. "
    ]
    mean, spread, runs = noise(comparison)
    notes.append(f"Errors of {runs} runs of kdlib in fp32: {mean:.0f} ± {spread:.0f}. ")
    once = [
        r["note"]["teacher_seconds"] for r in comparison["rows"] if "teacher_seconds" in r["note"]
    ]
    if once:
        notes.append(
            "Unless kdlib evaluates the teacher on every batch, it does so once before the first "
            f"step: {_three(statistics.median(once))} s, not in the table."
        )
    return _table(head, lines) + "\n\n" + "".join(notes)


def _sweeps(record: Record) -> list[str]:
    """Sweeps of many runs: peers' times are those of one run multiplied."""
    lines = []
    for comparison in record["comparisons"]:
        task, count = comparison["task"], record["scale"]["sweep"]
        alike = [group for group in record["groups"] if group["task"] == task]
        rows = [(row, "one run, multiplied") for row in comparison["rows"] if _is_peer(row)]
        once: dict[str, Row] = {}  # of a system that was measured twice the first
        for part in [comparison, *alike]:
            for row in part["rows"]:
                if row["runs"] == count:
                    once.setdefault(row["label"], row)
        rows += [(row, "measured") for row in once.values()]
        if not any(how == "measured" for _, how in rows):
            continue
        for row, how in rows:
            if not row["failure"]:
                minutes = row["step_seconds"] * 60_000 / task["batch_size"] * count / 60
                lines.append((_name(task), row["label"], _three(minutes), how))
    if not lines:
        return []
    head = ("task", "system", "minutes per epoch, all runs", "how")
    return [f"### A sweep of {record['scale']['sweep']} runs", _table(head, lines)]


def _limits(record: Record) -> str:
    """Measured time of a step against the two physical limits."""
    lines = []
    for comparison in record["comparisons"]:
        for row in comparison["rows"]:
            if row["system"] != "kdlib" or not row["cached"] or row["failure"]:
                continue
            binds, seconds, share = _bound(row)
            bound = row["limit"]
            lines.append(
                (
                    _name(comparison["task"]),
                    row["label"],
                    f"{_three(bound['operations'] / 1e9)} at {_three(bound['matmul_rate'] / 1e9)}",
                    f"{_three(bound['bytes'] / 1e6)} at {_three(bound['copy_rate'] / 1e9)}",
                    binds,
                    _three(1000 * seconds),
                    _three(1000 * row["step_seconds"] * row["runs"]),
                    f"{share:.0%}",
                )
            )
    head = ("task", "system", "GFLOP at GFLOP/s", "MB at GB/s", "bound by")
    head = (*head, "limit, ms", "step, ms", "share")
    return _table(head, lines)


def _memory(record: Record) -> str:
    """Peak memory of stacks against what was planned for them."""
    lines = [
        (
            f"{row['label']}, batch {part['task']['batch_size']}",
            str(row["runs"]),
            f"{row['note']['peak_bytes'] / 2**30:.2f}",
            f"{row['planned_bytes'] / 2**30:.2f}",
            _yes(row["note"]["peak_bytes"] <= row["planned_bytes"]),
        )
        for part in record["comparisons"] + record["groups"]
        for row in part["rows"]
        if "peak_bytes" in row["note"]
    ]
    return _table(("system", "runs", "peak, GiB", "planned, GiB", "within"), lines)


def figure(record: Record) -> str:
    """SVG: milliseconds per step and run against the number of runs in the stack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kdlib.book import plots

    plots.use()
    canvas, axes = plt.subplots(figsize=(6.4, 3.8))
    colours = [plots.COLOURS[name] for name in ("other", "amber", "light")]
    for group, colour in zip(record["groups"], colours, strict=False):
        rows = [row for row in group["rows"] if row["system"] == "kdlib" and not row["failure"]]
        if not rows:
            continue
        runs = [row["runs"] for row in rows]
        times = [1000 * row["step_seconds"] for row in rows]
        axes.plot(runs, times, marker="o", color=colour)
        label = f"{group['task']['student']}, {rows[0]['precision']}"
        axes.annotate(
            label, (runs[-1], times[-1]), (0, 7), textcoords="offset points",
            color=colour, ha="right",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="runs in the stack", ylabel="ms per step and run")
    sizes = record["scale"]["sizes"]
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    return plots.svg(canvas)


def _figure_block(record: Record, device: str) -> str:
    batch = record["groups"][0]["task"]["batch_size"] if record["groups"] else "?"
    return (
        f"```{{figure}} benchmark/{device}.svg\n"
        f":name: fig-benchmark-{device}\n"
        ":alt: Lines of the time of one step of one run against the number of runs in the stack, "
        "from one run on the left to the largest stack on the right.\n\n"
        f"Time per step and run for stacks of growing size; batch size {batch}, cached teacher.\n"
        "```"
    )


def _troubles(record: Record) -> list[str]:
    """What failed, and what the systems warned of."""
    lines = [
        f"- {row['label']}: {row['failure'].strip().splitlines()[-1]}"
        for row in _all_rows(record)
        if row["failure"]
    ]
    return ["### What failed", "\n".join(lines)] if lines else []


def _bound(row: Row) -> tuple[str, float, float]:
    """(what binds, seconds of a step of all runs at the limit, share of the limit reached)."""
    bound = row["limit"]
    times = {
        "operations": bound["operations"] / bound["matmul_rate"],
        "bytes": bound["bytes"] / bound["copy_rate"],
    }
    binds = max(times, key=lambda what: times[what])
    return binds, times[binds], times[binds] / (row["step_seconds"] * row["runs"])


def _equal(row: Row, comparison: Record) -> bool:
    """Whether errors agree with those of kdlib's fp32 runs, within their noise."""
    mean, spread, runs = noise(comparison)
    errors = _comparable(row, comparison)
    if not errors or runs < 2:
        return False
    allowed = DEVIATIONS * spread * math.sqrt(1 / len(errors) + 1 / runs)
    return abs(statistics.fmean(errors) - mean) <= allowed


def _comparable(row: Row, comparison: Record) -> list[int]:
    """Errors of the runs that have the task's own temperature."""
    pairs = zip(row["errors"], row["temperatures"], strict=False)
    return [wrong for wrong, scale in pairs if scale == comparison["task"]["temperature"]]


def _errors(row: Row, comparison: Record) -> str:
    errors = _comparable(row, comparison)
    if len(errors) < 2:
        return ", ".join(map(str, errors))
    return f"{statistics.fmean(errors):.0f} ± {statistics.stdev(errors):.0f}"


def _by_label(comparison: Record) -> dict[str, Row]:
    return {row["label"]: row for row in comparison["rows"]}


def _all_rows(record: Record) -> list[Row]:
    return [row for part in record["comparisons"] + record["groups"] for row in part["rows"]]


def _step(row: Row) -> float:
    return float(row["step_seconds"])


def _is_peer(row: Row) -> bool:
    return row["system"] in PEERS


def _name(task: Record) -> str:
    return f"{task['teacher']} → {task['student']}, batch {task['batch_size']}"


def _three(value: float) -> str:
    """A number to three digits, without an exponent."""
    if not math.isfinite(value) or value <= 0:
        return "–"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _times_of(value: float) -> str:
    return f"{_three(value)} ×" if math.isfinite(value) else "–"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
