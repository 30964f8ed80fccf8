"""Every system of the benchmark distils to the same weights; turns, limits and the page."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kernels, limit, programme, report, systems, turns
from kdlib import data, losses

TASK = systems.Task("lenet", "lenet-half", batch_size=64, dataset="mnist-5k", learning_rate=0.05)
PLAIN = systems.Task("mlp-16x16", "mlp-8", batch_size=64, dataset="mnist-5k", learning_rate=0.1)
STEPS = 8


def a_training(task, system, **options):
    """A training whose one batch is the whole of its data: the order of samples is immaterial."""
    whole = data.load("mnist-5k", "cpu")
    some = whole.train[::50][:64]
    none = data.Split(some.images[:0], some.labels[:0])
    small = data.Dataset("toy", some, none, whole.test, "")
    job = systems.Job(task, system, steps=STEPS, every=2, **options)
    teacher = systems.network(task.teacher, 7).requires_grad_(False)
    for weight in teacher.parameters():
        weight.mul_(3)  # an untrained teacher says little otherwise
    return systems.Training(job, small, teacher, torch.device("cpu"), lambda step: step >= STEPS)


def loss(network, training):
    """What the training's student is to make small, on all the samples."""
    task, full = training.job.task, training.dataset.full
    inputs = data.to_input(full.images)
    with torch.no_grad():
        return losses.distillation_loss(
            network(inputs),
            training.teacher(inputs),
            full.labels,
            temperature=task.temperature,
            hard_weight=task.hard_weight,
        ).item()


def by_hand(training):
    """The same descent in its plainest form: (students, loss before)."""
    task, full, student = training.job.task, training.dataset.full, training.student()
    before = loss(student, training)
    inputs = data.to_input(full.images)
    sgd = torch.optim.SGD(student.parameters(), task.learning_rate, task.momentum, nesterov=True)
    soft = nn.KLDivLoss(reduction="batchmean")
    for _ in range(STEPS):
        sgd.zero_grad()
        logits, scale = student(inputs), task.temperature
        kl = soft((logits / scale).log_softmax(1), (training.teacher(inputs) / scale).softmax(1))
        hard = nn.functional.cross_entropy(logits, full.labels)
        (task.hard_weight * hard + (1 - task.hard_weight) * scale**2 * kl).backward()
        sgd.step()
    return student, before


SAME = [
    ("article", {}),
    ("keras", {}),
    ("torchdistill", {}),
    ("kdlib", {}),
    ("kdlib", {"cached": False}),
    ("kdlib", {"runs": 2}),
    ("kdlib", {"runs": 2, "cached": False}),
]


@pytest.mark.parametrize("task", [TASK, PLAIN], ids=["lenet", "mlp"])
@pytest.mark.parametrize(("system", "options"), SAME)
def test_every_system_takes_the_same_steps(task, system, options):
    given = a_training(task, system, **options)
    expected, before = by_hand(given)
    student = systems.SYSTEMS[system](given)[0]
    after = loss(student, given)
    assert after < 0.9 * before
    assert after == pytest.approx(loss(expected, given), rel=1e-4)
    for mine, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_digits_one_by_one_are_the_inputs_that_kdlib_makes():
    split = data.load("mnist-5k", "cpu").test[:5]
    images, labels = zip(*systems.Digits(split), strict=True)
    torch.testing.assert_close(torch.stack(images), data.to_input(split.images))
    assert list(labels) == split.labels.tolist()


# --- turns ---------------------------------------------------------------------------------


class Told:
    """A worker's end of the line that says what a list holds, and notes when it is told to go."""

    def __init__(self, name, words, order):
        self.name, self.words, self.order = name, iter(words), order

    def send(self, word):
        self.order.append(self.name)

    def recv(self):
        return next(self.words)


def test_systems_take_turns_and_the_first_turn_is_not_counted(monkeypatch):
    order = []

    @contextlib.contextmanager
    def worker(job, device, teachers):
        spoken = [("turn", second) for second in (9.0, 3.0, 1.0, 2.0)]
        yield Told(job.system, [("ready", None), *spoken, ("done", ([7], {}))], order)

    monkeypatch.setattr(turns, "_start", worker)
    jobs = [systems.Job(TASK, name, steps=40, every=10, runs=2) for name in "AB"]
    first, second = turns.take(jobs, "cpu", Path())
    assert "".join(order) == "AB" * 5
    assert first.seconds == second.seconds == [3.0, 1.0, 2.0]
    assert first.step == pytest.approx(2.0 / 10 / 2)
    assert (first.errors, first.failure) == ([7], None)


def test_one_failure_leaves_the_others_alone(tmp_path):
    torch.save(systems.network("mlp-8", 0).state_dict(), tmp_path / "mlp-8.pt")
    task = systems.Task("mlp-8", "mlp-8", 16, dataset="mnist-5k")
    jobs = [systems.Job(task, name, steps=6, every=2) for name in ("nobody", "kdlib")]
    lost, kept = turns.take(jobs, "cpu", tmp_path)
    assert "KeyError: 'nobody'" in lost.failure
    assert lost.seconds == []
    assert kept.failure is None
    assert len(kept.seconds) == 2
    assert 0 < kept.errors[0] < 1000
    assert kept.note["threads"] >= 1


def test_a_process_that_dies_is_heard():
    here, there = multiprocessing.Pipe()
    there.close()
    result = turns.Result(systems.Job(TASK, "kdlib", steps=2, every=1))
    assert turns._receive(result, turns.Workers([here])) == "failed"
    assert "died" in result.failure


def test_a_job_in_processes_is_as_slow_as_the_slowest_and_keeps_the_order_of_its_runs(tmp_path):
    lines = [Told(name, [("turn", seconds)], []) for name, seconds in (("A", 2.0), ("B", 3.0))]
    assert turns.Workers(lines).recv() == ("turn", 3.0)
    lines = [Told("A", [("turn", 2.0)], []), Told("B", [("failed", "why")], [])]
    assert turns.Workers(lines).recv() == ("failed", "why")

    torch.save(systems.network("mlp-8", 0).state_dict(), tmp_path / "mlp-8.pt")
    task = systems.Task("mlp-8", "mlp-8", 16, dataset="mnist-5k", learning_rate=0.1)
    together = systems.Job(task, "kdlib-in-turn", steps=20, every=10, runs=4)
    apart = replace(together, processes=2)
    at_once = replace(together, every=20)  # a training in parts goes on where it was
    one, two, whole = turns.take([together, apart, at_once], "cpu", tmp_path)
    assert one.errors == two.errors == whole.errors
    assert len(set(one.errors)) > 1


# --- the limit -----------------------------------------------------------------------------


def test_operations_are_those_of_the_shapes():
    task = systems.Task("mlp-16", "mlp-8", 4)
    alone = systems.Job(task, "kdlib", steps=1, every=1)
    first, second = 2 * 4 * 784 * 8, 2 * 4 * 8 * 10  # no gradient of the pixels is asked for
    student = 2 * first + 3 * second
    teacher = 2 * 4 * (784 * 16 + 16 * 10)
    assert limit.operations(alone) == student
    assert limit.operations(replace(alone, cached=False, runs=3)) == 3 * (student + teacher)


def test_bytes_are_those_of_the_shapes():
    task = systems.Task("mlp-16", "mlp-8", 4)
    alone = systems.Job(task, "kdlib", steps=1, every=1)
    weights, outputs = 784 * 8 + 8 + 8 * 10 + 10, 8 + 8 + 10
    moved = 32 * weights + 4 * (20 * outputs + 784 * 13)
    assert limit.touched(alone)[0] == moved
    asked = 4 * (784 * 16 + 16 + 16 * 10 + 10) + 4 * 2 * 4 * (16 + 16 + 10)
    assert limit.touched(replace(alone, cached=False, runs=3))[0] == 3 * (moved + asked)
    assert limit.touched(replace(alone, precision="bf16"))[0] < moved


def test_the_kernels_of_the_last_steps_are_counted(capsys):
    few = "--device cpu --dataset mnist-5k --precision fp32 --batch 64 --runs 2 --steps 3"
    kernels.main(few.split())
    update = next(line for line in capsys.readouterr().out.splitlines() if "_fused_sgd_" in line)
    assert int(update.split()[-1]) == 3


def test_rates_are_measured():
    device = torch.device("cpu")
    assert limit.matmul_rate(device, "fp32", 64) > 1e6
    assert limit.copy_rate(device, 2**20) > 1e6


# --- the page ------------------------------------------------------------------------------


def row(label, system, step, errors, **options):
    known = {"runs": 1, "cached": True, "precision": "fp32", "every": 10, "steps": 30}
    bound = {"operations": 1e6, "bytes": 1e6, "matmul_rate": 1e9, "copy_rate": 2e9}
    made = known | options
    made |= {"label": label, "system": system, "step_seconds": step, "errors": errors}
    made |= {"seconds": [10 * step * made["runs"]] * 2, "temperatures": [4.0] * len(errors)}
    return {"limit": bound, "note": {}, "failure": None, "planned_bytes": 2e9} | made


def record(*rows, gpu=None):
    task = asdict(TASK)
    stacks = [row(f"stack of {n}", "kdlib", 0.01 / n, [50] * n, runs=n) for n in (1, 2)]
    return {
        "device": "cpu", "quick": False, "date": "2026-01-01T00:00:00+00:00", "seconds": 60.0,
        "machine": {"gpu": gpu, "processor": "p", "cores": 2, "memory_bytes": 2**34, "system": "s"},
        "versions": {"python": "3", "keras": "absent"}, "threads": 2, "load_before": 0.1,
        "scale": {"sweep": 2, "sizes": [1, 2]},
        "comparisons": [{"task": task, "rows": list(rows)}],
        "groups": [{"task": task, "rows": stacks}],
    }  # fmt: skip


def usual(ours=0.002, errors=50, **options):
    return [
        row("the article’s loop", "article", 0.010, [52]),
        row("Keras", "keras", 0.020, [48]),
        row("torchdistill", "torchdistill", 0.008, [50]),
        row("kdlib", "kdlib", ours, [errors], **options),
        row("kdlib, stack of 3", "kdlib", 0.004, [49, 50, 51], runs=3),
    ]


def aims(made):
    """The rows of the table of aims, as (target, measured, met)."""
    block = report.page(made, "cpu").split("### Targets")[1].split("###")[0]
    return [tuple(line.strip("| ").split(" | ")[1:]) for line in block.strip().splitlines()[2:]]


def test_the_aims_are_computed_from_the_times():
    single = row("kdlib, one thread", "kdlib", 0.004, [50], threads=1)
    assert aims(record(*usual(), single)) == [
        ("2.4 × the article’s loop, with one thread", "2.50 × (kdlib, one thread)", "yes"),
        ("4 × the article’s loop, with two threads or two runs side by side", "5.00 × (kdlib)",
         "yes"),
        ("faster than the fastest peer", "4.00 × (torchdistill)", "yes"),
        ("compatible results", "all within 50 ± 3", "yes"),
    ]  # fmt: skip
    slow = single | {"step_seconds": 0.005}
    met = [met for *_, met in aims(record(*usual(ours=0.003), slow))]
    assert met == ["no", "no", "yes", "yes"]
    assert [met for *_, met in aims(record(*usual(ours=0.009)))] == ["no", "no", "yes"]


def test_a_result_that_differs_does_not_count():
    fast = row("kdlib, bf16", "kdlib", 0.0001, [90], precision="bf16")
    made = record(*usual(), fast)
    assert "kdlib, bf16" not in str(aims(made))
    (only,) = report.unmet(made)
    assert "kdlib, bf16: 90 test errors, expected about 50" in only
    fast["errors"] = [51]
    assert "100 × (kdlib, bf16)" in str(aims(made))
    assert report.unmet(made) == []


def test_a_failure_is_told_and_leaves_the_page_whole():
    broken = row("torchdistill", "torchdistill", 1.0, [], failure="Traceback\nOSError: no box")
    rows = usual()
    rows[2] = {key: broken[key] for key in broken if key not in ("step_seconds", "limit")}
    made = record(*rows)
    assert "OSError: no box" in report.page(made, "cpu")
    assert any("no box" in line for line in report.unmet(made))


def test_a_gpus_aims_are_share_sweep_and_memory():
    rows = [row("the article’s loop", "article", 0.010, [50])]
    stack = row("kdlib, stack of 2", "kdlib", 0.00005, [50, 51], runs=2)
    rows.append(stack)
    assert [entry[1:] for entry in aims(record(*rows, gpu="some GPU"))] == [
        ("200 ×", "yes"),
        ("1000%", "yes"),
    ]
    stack["step_seconds"], stack["note"] = 0.0002, {"peak_bytes": 3e9}
    slow = [entry[1:] for entry in aims(record(*rows, gpu="some GPU"))]
    assert slow[0] == ("50.0 ×", "no")
    assert slow[2] == ("150% of it", "no")


def test_a_sweep_of_peers_is_one_time_multiplied():
    page = report.page(record(*usual()), "cpu")
    sweep = page.split("### A sweep of 2 runs")[1].split("###")[0]
    minutes = 0.010 * 60_000 / 64 * 2 / 60
    assert f"the article’s loop | {minutes:.3f} | one run, multiplied" in sweep
    assert "stack of 2 | 0.156 | measured" in sweep


def test_a_sweep_measured_twice_is_shown_once():
    made = record(*usual())
    made["groups"] = 2 * made["groups"]
    sweep = report.page(made, "cpu").split("### A sweep of 2 runs")[1].split("###")[0]
    assert sweep.count("stack of 2 | 0.156 | measured") == 1


def test_without_a_record_the_page_says_so(tmp_path):
    report.render(tmp_path, tmp_path / "pages")
    assert "make bench-gpu" in (tmp_path / "pages" / "cuda.md").read_text()


def test_the_books_page_is_what_the_records_say(tmp_path):
    report.render(report.RESULTS, tmp_path)
    for device in report.ORDERED:
        assert (tmp_path / f"{device}.md").read_text() == (
            report.PAGES / f"{device}.md"
        ).read_text(), "`python -m benchmarks --render` renders the page again"
        assert (tmp_path / f"{device}.svg").is_file() == (report.PAGES / f"{device}.svg").is_file()


def test_a_bare_machine_with_pytorch_can_measure(tmp_path):
    """What a GPU's part imports is in PyTorch's own company: torchvision, NumPy, filelock."""
    packages = "pandas safetensors tqdm matplotlib mlxtend platformdirs keras torchdistill yaml"
    hidden = f"import sys\nfor name in {packages!r}.split(): sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    for needed in ("benchmarks.__main__", "benchmarks.systems", "kdlib"):
        code = f"import {needed}"
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True
        )


def test_a_trial_from_end_to_end(tmp_path):
    scale = replace(programme.GPU, **programme.QUICK)
    scale = replace(scale, samples=300, group_samples=200, sizes=(1,), sweep=2, matmul=32)
    path = tmp_path / "deep" / "cuda.json"
    programme.on_gpu(scale, "cpu", programme.save_to(path))
    made = json.loads(path.read_text())
    assert [row["failure"] for part in made["comparisons"] for row in part["rows"]] == [None] * 7
    assert {row["runs"] for row in made["comparisons"][0]["rows"]} == {1, 2}
    assert [part["rows"][0]["precision"] for part in made["groups"]] == ["fp32", "bf16"]
    report.render(path.parent, path.parent)
    page = (path.parent / "cuda.md").read_text()
    assert "nan" not in page
    assert "too short to mean anything" in page
    assert (path.parent / "cuda.svg").read_text().startswith("<?xml")
