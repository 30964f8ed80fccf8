"""What is measured: tasks, systems, sweeps and stacks; all of it as one record."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kdlib
from benchmarks import limit, turns
from benchmarks.systems import PEERS, Job, Task, network
from kdlib import data, files, loop, losses, memory
from kdlib.precision import effective
from kdlib.provenance import processor

LENET = Task("lenet", "lenet-half", 64)
PLAIN = Task("mlp-1200x1200", "mlp-800x800", 64)
PACKAGES = ("torch", "torchvision", "numpy", "kdlib", "keras", "torchdistill")
Record = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured. samples: what a job trains on in all its turns together."""

    dataset: str = "mnist"
    batches: tuple[int, ...] = (64, 256)
    teacher_epochs: float = 2
    turns: int = 5  # and one more, to warm up
    samples: int = 30_000
    group_samples: int = 9_600  # likewise, in sweeps and in stacks of growing size
    stack: int = 4
    sweep: int = 32
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    matmul: int = 2048

    def tasks(self, *pairs: Task) -> list[Task]:
        """Pairs of networks at every size of a batch, on this scale's data."""
        sized = [replace(pair, batch_size=size) for pair in pairs for size in self.batches]
        return [replace(task, dataset=self.dataset) for task in sized]

    def job(self, task: Task, system: str, samples: int, **options: Any) -> Job:
        """A job with this scale's numbers of steps."""
        every = max(1, round(samples / task.batch_size / (self.turns + 1)))
        return Job(task, system, steps=every * (self.turns + 1), every=every, **options)


CPU = Scale()
GPU = Scale(
    turns=3,
    samples=96_000,
    group_samples=24_000,
    sweep=64,
    sizes=(1, 4, 16, 64, 256),
    matmul=8192,
)
QUICK = {
    "dataset": "mnist-5k",
    "batches": (64,),
    "teacher_epochs": 1,
    "turns": 2,
    "samples": 1_500,
    "group_samples": 800,
    "stack": 2,
    "sweep": 4,
    "sizes": (1, 2),
    "matmul": 256,
}


def on_cpu(scale: Scale, device: str, save: Callable[[Record], None]) -> Record:
    """Every system on every task, a sweep, and stacks of growing size."""
    record = _header(scale, device)
    host = torch.device(device)  # bf16 is measured where the processor is fast at it
    precisions = [p for p in ("fp32", "bf16") if effective(p, host) == p]
    with tempfile.TemporaryDirectory() as folder:
        teachers, tasks = Path(folder), scale.tasks(LENET, PLAIN)
        _teach(tasks, scale, device, teachers)
        for task in tasks:
            jobs = [scale.job(task, peer, scale.samples) for peer in PEERS]
            for options in (
                *({"precision": precision} for precision in precisions),
                {"precision": precisions[-1], "threads": 1},
                {"cached": False},
                {"runs": scale.stack, "seed": 1},
                {"runs": scale.stack, "seed": 1 + scale.stack, "cached": False},
            ):
                jobs.append(scale.job(task, "kdlib", scale.samples, **options))
            if torch.get_num_threads() > 1:
                pair = {"runs": 2, "processes": 2, "precision": precisions[-1], "threads": 2}
                jobs.append(scale.job(task, "kdlib-in-turn", scale.samples, **pair))
            record["comparisons"].append(_compare(jobs, scale, device, teachers))
            save(record)
        for task in tasks[:: len(scale.batches)]:
            sweep = {"runs": scale.sweep}
            apart = {**sweep, "processes": math.gcd(scale.sweep, torch.get_num_threads())}
            jobs = [
                scale.job(task, "kdlib-in-turn", scale.group_samples, **split, precision=precision)
                for precision in precisions
                for split in ((sweep, apart) if apart["processes"] > 1 else (sweep,))
            ]
            jobs += [
                scale.job(task, "kdlib", scale.group_samples, runs=runs) for runs in scale.sizes
            ]
            record["groups"].append(_compare(jobs, scale, device, teachers))
            save(record)
    return _close(record, save)


def on_gpu(scale: Scale, device: str, save: Callable[[Record], None]) -> Record:
    """A sweep in one stack against the article's loop, and stacks of growing size."""
    record = _header(scale, device)
    warmth = tuple(float(temperature) for temperature in range(2, 10))  # the task's among them
    with tempfile.TemporaryDirectory() as folder:
        teachers, tasks = Path(folder), scale.tasks(PLAIN)
        _teach(tasks, scale, device, teachers)
        for task in tasks:
            jobs = [scale.job(task, "article", scale.samples)]
            for options in (
                {},
                {"cached": False},
                {"runs": scale.sweep, "temperatures": warmth},
                {"runs": scale.sweep, "temperatures": warmth, "precision": "tf32"},
                {"runs": scale.sweep, "temperatures": warmth, "precision": "bf16"},
                {"runs": scale.sweep, "temperatures": warmth, "cached": False},
            ):
                jobs.append(scale.job(task, "kdlib", scale.samples, **options))
            record["comparisons"].append(_compare(jobs, scale, device, teachers))
            save(record)
        for precision in ("fp32", "bf16"):
            jobs = [
                scale.job(tasks[0], "kdlib", scale.group_samples, runs=runs, precision=precision)
                for runs in scale.sizes
            ]
            record["groups"].append(_compare(jobs, scale, device, teachers))
            save(record)
    return _close(record, save)


def _compare(jobs: Sequence[Job], scale: Scale, device: str, teachers: Path) -> Record:
    """Jobs of one task side by side, as rows with their limits."""
    print(f"{jobs[0].task.student}, batch {jobs[0].task.batch_size}:", flush=True)
    rows = []
    for result in turns.take(jobs, device, teachers):
        row = _row(result, scale, torch.device(device))
        rows.append(row)
        said = row["failure"] or f"{1000 * row['step_seconds']:.3f} ms a step and run"
        print(f"  {row['label']}: {said}, errors {row['errors']}", flush=True)
    return {"task": asdict(jobs[0].task), "rows": rows}


def _row(result: turns.Result, scale: Scale, device: torch.device) -> Record:
    job = result.job
    row: Record = {"label": job.label, **asdict(job), **asdict(result)}
    del row["task"], row["job"]
    row["temperatures"] = [job.temperature(run) for run in range(job.runs)]
    if result.failure is None:
        row["step_seconds"] = result.step
        moved, live = limit.touched(job)
        row["limit"] = {
            "operations": limit.operations(job),
            "bytes": moved,
            "matmul_rate": limit.matmul_rate(device, job.precision, scale.matmul),
            "copy_rate": limit.copy_rate(device, live),
        }
        row["planned_bytes"] = _plan(job)
    return row


def _plan(job: Job) -> int:
    """What kdlib plans for the runs of a stack on a GPU, the data included."""
    recipe = kdlib.Recipe(
        job.task.student, dataset=job.task.dataset, batch_size=job.task.batch_size
    )
    return memory.planned(recipe, job.runs, torch.device("cpu"))


def _teach(tasks: Sequence[Task], scale: Scale, device: str, folder: Path) -> None:
    """Train each teacher once and leave its weights in a folder."""
    full = data.load(scale.dataset, device).full
    for name in dict.fromkeys(task.teacher for task in tasks):
        made = network(name, 0).to(device)
        pair = [full.images, full.labels]
        kdlib.fit(made, pair, losses.cross_entropy, epochs=scale.teacher_epochs)
        weights = {key: weight.cpu() for key, weight in made.state_dict().items()}
        torch.save(weights, folder / f"{name}.pt")
        errors = loop.count_errors(made, full.images, full.labels)
        print(f"teacher {name}: {errors} of {len(full)} training samples wrong", flush=True)


def _header(scale: Scale, device: str) -> Record:
    """Where and with what it is measured."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from its folder" if package in sys.modules else "absent"
    cuda = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "device": device,
        "scale": asdict(scale),
        "quick": scale.dataset == QUICK["dataset"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "gpu": cuda,
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **found},
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "seconds": -time.time(),
        "comparisons": [],
        "groups": [],
    }


def _close(record: Record, save: Callable[[Record], None]) -> Record:
    record["seconds"] += time.time()
    save(record)
    return record


def save_to(path: Path) -> Callable[[Record], None]:
    """A function that keeps a record in a file."""
    return lambda record: files.put(path, f"{json.dumps(record, indent=1)}\n".encode())


def noise(comparison: Record) -> tuple[float, float, int]:
    """Test errors over kdlib's own fp32 runs at the task's temperature: mean, deviation, runs."""
    chosen = comparison["task"]["temperature"]
    errors = [
        wrong
        for row in comparison["rows"]
        if row["system"] == "kdlib" and row["precision"] == "fp32"
        for wrong, temperature in zip(row["errors"], row["temperatures"], strict=False)
        if temperature == chosen
    ]
    spread = statistics.stdev(errors) if len(errors) > 1 else float("nan")
    return (statistics.fmean(errors) if errors else float("nan")), spread, len(errors)
