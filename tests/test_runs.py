"""Runs: made once, the same bits each time, from their key alone, whatever happens meanwhile."""

import gc
import importlib.metadata
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FORKS, blobs, exit_codes, numbers, process
from torch import Tensor, nn

import kdlib
from kdlib import (
    Recipe,
    data,
    evaluate,
    group,
    keys,
    loop,
    losses,
    memory,
    models,
    provenance,
    runs,
    slots,
    store,
)

CPU = torch.device("cpu")
MIXED = {"dropout": (0.2, 0.5), "jitter": 1, "max_norm": 2.0}


def shuffled_test_labels() -> data.Arrays:
    images, labels, test_images, test_labels = blobs()
    return images, labels, test_images, test_labels.roll(1)


def register_data() -> None:
    data.register("blobs", blobs)
    data.register("blobs-with-other-test-labels", shuffled_test_labels)


register_data()  # for the recipes below, here and in processes that import this file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, and small data by name."""
    monkeypatch.setattr(data, "_registered", {})
    monkeypatch.setattr(models, "_registered", {})
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    # In this process, whose steps are counted: see test_side_by_side for several.
    monkeypatch.setattr(slots, "cores", lambda: 1)
    register_data()
    return tmp_path / "home"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where in its schedule each step is that is trained from here on."""
    taken: list[float] = []
    schedule = loop.SCHEDULES["one-cycle"]

    def counted(at: float, *rest: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(at)
        return schedule(at, *rest)

    monkeypatch.setitem(loop.SCHEDULES, "one-cycle", counted)
    return taken


def small(model: str = "mlp-16", **fields: Any) -> Recipe:
    kind = {"dataset": "blobs", "epochs": 5, "batch_size": 20, "learning_rate": 0.05}
    return Recipe(model, **kind | fields)


def student(**fields: Any) -> Recipe:
    taught = small("mlp-12", **fields).distil(small(seed=7), temperature=3.3, hard_weight=0.1)
    return taught.replace(learning_rate=0.02)


def same_bits(first: kdlib.Run, second: kdlib.Run) -> bool:
    assert first.weights.keys() == second.weights.keys()
    equal = all(torch.equal(w, second.weights[name]) for name, w in first.weights.items())
    return equal and repr(first.curves) == repr(second.curves) and first.metrics == second.metrics


def gap(first: kdlib.Run, second: kdlib.Run) -> float:
    return max((w - second.weights[n]).abs().max().item() for n, w in first.weights.items())


def elsewhere(
    monkeypatch: pytest.MonkeyPatch, home: Path, recipes: list[Recipe], **how: Any
) -> list[kdlib.Run]:
    """The runs of recipes, trained without interruption into an empty store of their own."""
    with monkeypatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home.with_name("elsewhere")))
        return kdlib.train_all(recipes, "cpu", **how)


# --- made once


def test_a_run_is_made_once(trained: list[float]) -> None:
    first = kdlib.train(small(), "cpu")
    assert (first.cached, len(trained)) == (False, 60)
    again = kdlib.train(small(), "cpu")
    assert (again.cached, len(trained)) == (True, 60)
    assert same_bits(first, again)
    assert again.provenance == first.provenance
    assert again.seconds == first.seconds > 0
    assert kdlib.train(small(seed=1), "cpu").cached is False


def test_runs_come_in_the_order_asked_and_each_once(trained: list[float]) -> None:
    recipes = [small(seed=2), student(), small(seed=1), small(seed=2), small(seed=7)]
    got = kdlib.train_all(recipes, "cpu")
    assert [run.recipe for run in got] == recipes
    assert got[0] is got[3]
    assert len(trained) == 4 * 60  # the teacher is one of those asked for
    assert len(store.stored()) == 4
    assert kdlib.train_all([], "cpu") == []


def test_teachers_are_trained_first_and_stored(trained: list[float]) -> None:
    chain = student().replace(seed=3).distil(student(), temperature=2)
    run = kdlib.train(chain, "cpu")
    assert run.recipe.teacher[0].teacher == (small(seed=7),)
    assert len(trained) == 3 * 60
    assert [kdlib.train(r, "cpu").cached for r in (student(), small(seed=7))] == [True, True]


@pytest.mark.parametrize("stack", [0, -1])
def test_a_stack_of_no_runs_is_refused(stack: int) -> None:
    with pytest.raises(ValueError, match=f"stack is {stack}: expected"):
        kdlib.train_all([small()], "cpu", stack=stack)


def test_one_recipe_in_two_spellings_is_trained_once() -> None:
    spellings = [small(omit=(7, 8)), small(omit=(8, 7))]
    first, second = kdlib.train_all(spellings, "cpu", stack=2)
    assert first is second


def test_a_runs_memory_goes_with_it() -> None:
    run = kdlib.train(small(), "cpu")
    run.logits("test")
    watched = weakref.ref(run)
    del run
    gc.collect()
    assert watched() is None


# --- what a run says


def answers(run: kdlib.Run, part: data.Split) -> Tensor:
    with torch.no_grad():
        return run.model()(part.images[:, None].float() / 255).argmax(-1)


def test_metrics_are_those_of_the_weights() -> None:
    dataset = data.load("blobs", "cpu")
    run = kdlib.train(small(), "cpu")
    errors = int((answers(run, dataset.test) != dataset.test.labels).sum())
    accuracy = 1 - errors / 60
    assert run.metrics == {"status": "ok", "test_errors": errors, "test_accuracy": accuracy}
    assert run.curves.keys() == {"step", "train_loss", "train_accuracy", "test_errors"}
    assert run.curves["step"] == [12, 24, 36, 48, 60]
    assert run.curves["test_errors"][-1] == errors
    assert not run.model().training


def test_validating_runs_count_errors_on_the_held_out_sixth() -> None:
    dataset = data.load("blobs", "cpu")
    run = kdlib.train(small(validation=True), "cpu")
    for name, part in (("validation", dataset.validation), ("test", dataset.test)):
        errors = int((answers(run, part) != part.labels).sum())
        assert run.metrics[f"{name}_errors"] == errors
        assert run.metrics[f"{name}_accuracy"] == pytest.approx(1 - errors / len(part))
    assert run.curves["validation_errors"][-1] == run.metrics["validation_errors"]
    assert run.curves["step"][-1] == 50  # five passes over 200 samples, not 240
    assert "validation_errors" not in kdlib.train(small(), "cpu").metrics


def test_logits_of_each_split() -> None:
    run = kdlib.train(small(precision="fp64"), "cpu")
    dataset = data.load("blobs", "cpu")
    for name, size in (("train", 200), ("validation", 40), ("full", 240), ("test", 60)):
        logits = run.logits(name)
        assert logits.shape == (size, 10)
        assert logits.dtype == torch.float32
        assert torch.equal(logits.argmax(-1), answers_fp64(run, getattr(dataset, name)))
    assert run.logits("test") is run.logits("test")
    with pytest.raises(ValueError, match="unknown split 'tset': expected one of train, validation"):
        run.logits("tset")


def answers_fp64(run: kdlib.Run, part: data.Split) -> Tensor:
    with torch.no_grad():
        return run.model()((part.images[:, None].float() / 255).double()).argmax(-1)


def test_a_clone_that_is_not_installed_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert provenance.provenance(torch.device("cpu"))["kdlib"] == "not installed"


def test_provenance_says_where_a_run_comes_from() -> None:
    origin = kdlib.train(small(), "cpu").provenance
    assert origin["torch"] == torch.__version__
    assert origin["threads"] == 1
    assert origin["precision"] == "fp32"
    assert origin.keys() >= {"device", "python", "kdlib", "date"}


def test_one_bar_a_group_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kdlib.train_all([small(seed=seed, epochs=30) for seed in range(3)], "cpu", stack=3)
    said = capfd.readouterr().err
    assert "mlp-16, 3 runs x 30 epochs" in said
    assert all(f"{name}=" in said for name in ("train_loss", "train_accuracy", "test_errors"))


def test_no_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    kdlib.train_all([small(), student()], "cpu")
    assert capfd.readouterr() == ("", "")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        kdlib.train(small(), "gpu")
    data.register("bad", lambda: (torch.zeros(2, 28, 28), *blobs()[1:]))
    with pytest.raises(data.DataError, match=r"bad: images are torch.float32"):
        kdlib.train(small(dataset="bad"), "cpu")
    with pytest.raises(ValueError, match=r"omit=\(0, 1.* leaves no class"):
        kdlib.train(small(omit=tuple(range(10))), "cpu")
    data.register("more", lambda: tuple(part + (part.dim() == 1) for part in blobs()))
    with pytest.raises(ValueError, match=r"'more': it gives 10 logits, expected .* 11 classes"):
        kdlib.train(small(dataset="more"), "cpu")
    data.register("larger", lambda: tuple(p.repeat((1, 2, 1)[: p.dim()]) for p in blobs()))
    with pytest.raises(ValueError, match=r"'larger': it gives no logits for images of \(56, 28\)"):
        kdlib.train(small(dataset="larger"), "cpu")
    assert store.stored() == []


# --- the same bits


@pytest.mark.parametrize(
    ("recipes", "how"),
    [
        ([small(**MIXED)], {}),
        ([small(precision="bf16")], {}),
        ([small("lenet-half")], {}),
        ([student(), student(jitter=2)], {}),
        ([student(seed=1), student(seed=2)], {"stack": 2}),
        ([small(seed=s, **MIXED) for s in range(3)], {"stack": 3}),
    ],
)
def test_two_trainings_into_two_empty_stores_have_equal_bits(
    home: Path, monkeypatch: pytest.MonkeyPatch, recipes: list[Recipe], how: dict[str, Any]
) -> None:
    first = kdlib.train_all(recipes, "cpu", **how)
    torch.manual_seed(5)
    second = elsewhere(monkeypatch, home, recipes, **how)
    for one, other in zip(first, second, strict=True):
        assert not one.cached
        assert not other.cached
        assert same_bits(one, other)


DIGEST = """
import sys, hashlib
sys.path[:0] = {paths}
import torch, kdlib
threads = torch.get_num_threads()
from helpers import blobs
kdlib.data.register("blobs", blobs)
teacher = kdlib.Recipe("mlp-300", dataset="blobs", steps=20, batch_size=64, jitter=1)
student = kdlib.Recipe("lenet-half", dataset="blobs", steps=20, batch_size=64, seed=1)
recipes = [student.distil(teacher, temperature=4.0), student]
digest = hashlib.sha256()
for run in kdlib.train_all(recipes, "cpu", stack={stack}):
    for name, weight in sorted(run.weights.items()):
        digest.update(weight.numpy().tobytes())
    digest.update(repr((run.curves, run.metrics)).encode())
    digest.update(run.logits("test").numpy().tobytes())
assert torch.get_num_threads() == threads
print(digest.hexdigest())
"""


@pytest.mark.parametrize("stack", [1, 2])
def test_a_run_has_the_same_bits_for_any_number_of_threads(home: Path, stack: int) -> None:
    paths = [str(Path(__file__).parent), str(Path(kdlib.__file__).parents[1])]
    script, found = DIGEST.format(paths=paths, stack=stack), dict[str, str]()
    for threads in ("1", "2", "4"):
        environment = {"OMP_NUM_THREADS": threads, "KDLIB_HOME": str(home.with_name(threads))}
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment,
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr
        found[threads] = result.stdout
    assert len(set(found.values())) == 1


def test_a_training_has_as_many_threads_as_it_is_given() -> None:
    before = torch.get_num_threads()
    assert kdlib.train(small(seed=1), "cpu", threads=2).provenance["threads"] == 2
    assert torch.get_num_threads() == before
    assert kdlib.train(small(seed=1), "cpu").cached  # threads are not in the key
    for threads in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"threads is {threads}: expected a whole number, 1"):
            kdlib.train(small(), "cpu", threads=threads)


def test_a_notebooks_default_dtype_changes_no_bit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = kdlib.train_all([student(**MIXED)], "cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        (second,) = elsewhere(monkeypatch, home, [student(**MIXED)])
    finally:
        torch.set_default_dtype(before)
    assert {weight.dtype for weight in second.weights.values()} == {torch.float32}
    assert same_bits(first, second)
    assert torch.equal(first.logits("test"), second.logits("test"))


def test_seeds_differ() -> None:
    first, second = kdlib.train_all([small(seed=0), small(seed=1)], "cpu")
    assert gap(first, second) > 0.01


# --- what a recipe means for the loop


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the loop is called with: its settings, `data` and `loss` among them."""
    calls: list[dict[str, Any]] = []
    fit = loop.fit

    def noted(model: nn.Module, **settings: Any) -> loop.Curves:
        calls.append(settings)
        return fit(model, **settings)

    monkeypatch.setattr(loop, "fit", noted)
    return calls


def test_the_validation_part_goes_first_then_classes_and_fraction(
    asked: list[dict[str, Any]],
) -> None:
    dataset = data.load("blobs", "cpu")
    held_out = set(numbers(dataset.validation.images).tolist())
    kdlib.train_all([small(validation=v, fraction=0.25, omit=(3, 4)) for v in (True, False)], "cpu")
    for call, part in zip(asked, (dataset.train, dataset.full), strict=True):
        images, labels = call["data"]
        assert torch.equal(images, part.images)
        chosen = numbers(images[call["rows"]])
        counted = labels[call["rows"]].bincount(minlength=10)
        sizes = part.labels.bincount(minlength=10)
        expected = [0 if c in (3, 4) else round(0.25 * int(n)) for c, n in enumerate(sizes)]
        assert counted.tolist() == expected
        assert torch.equal(labels[call["rows"]], chosen % 10)
        if part is dataset.train:
            assert not held_out & set(chosen.tolist())
    subsets = [call["rows"].tolist() for call in asked]
    kdlib.train(small(fraction=0.25, omit=(3, 4), subset_seed=1), "cpu")
    assert asked[2]["rows"].tolist() != subsets[1]


def test_fields_reach_the_loop(asked: list[dict[str, Any]]) -> None:
    fields = {"momentum": 0.5, "schedule": "cosine", "max_norm": 3.0, "jitter": 2, "seed": 4}
    kdlib.train(small(steps=7, precision="fp64", **fields), "cpu")
    (call,) = asked
    assert {name: call[name] for name in fields} == fields
    assert (call["steps"], call["batch_size"], call["learning_rate"]) == (7, 20, 0.05)
    assert call["precision"] == "fp64"


def test_bug_teacher_logits_cached_by_batch_index(asked: list[dict[str, Any]]) -> None:
    """Logits lie beside the sample that they belong to, known by its number."""
    kdlib.train(student(), "cpu")
    teacher = kdlib.train(small(seed=7), "cpu")
    images, _, taught = asked[-1]["data"]
    torch.testing.assert_close(taught, teacher.logits("full"))
    with torch.no_grad():
        torch.testing.assert_close(taught[5], teacher.model()(data.to_input(images[5:6]))[0])
    assert (taught.roll(1, 0) - taught).abs().max() > 0.1  # the neighbour's would be noticed


def test_several_teachers_are_averaged_by_their_logits(asked: list[dict[str, Any]]) -> None:
    members = [small(seed=seed) for seed in (7, 8)]
    still = small("mlp-12").distil(*members, temperature=4)
    first, second = (run.logits("full") for run in kdlib.train_all(members, "cpu"))
    kdlib.train(still, "cpu")
    torch.testing.assert_close(asked[-1]["data"][2], (first + second) / 2)
    mean = losses.ensemble_soft_targets([first, second], 4, "geometric")
    torch.testing.assert_close(losses.soften(asked[-1]["data"][2], 4), mean)
    kdlib.train(still.replace(jitter=1), "cpu")
    inputs = data.to_input(data.load("blobs", "cpu").full.images)
    committee = asked[-1]["teacher"]
    torch.testing.assert_close(committee(inputs), (first + second) / 2)
    assert len(asked[-1]["data"]) == 2  # inputs change: no logits can be kept


def test_the_loss_is_the_recipes(asked: list[dict[str, Any]]) -> None:
    kdlib.train_all([student(), small(seed=7)], "cpu")
    plain, taught = (call["loss"] for call in asked)
    logits, soft, labels = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    assert plain is losses.cross_entropy
    expected = losses.distillation_loss(logits, soft, labels, temperature=3.3, hard_weight=0.1)
    assert torch.equal(taught(logits, labels, soft), expected)
    other = losses.distillation_loss(logits, soft, labels, temperature=3.3, hard_weight=0.9)
    assert not torch.equal(taught(logits, labels, soft), other)


# --- stacks


def test_recipes_of_one_shape_are_cut_alike() -> None:
    recipes = [small(seed=seed) for seed in range(5)]
    assert [len(members) for members in memory.cut(recipes, CPU, 2)] == [2, 2, 1]
    assert [len(members) for members in memory.cut(recipes, CPU)] == [1] * 5
    own = {"learning_rate": 0.2, "momentum": 0.5, "seed": 9, "subset_seed": 3, "jitter": 1}
    assert len(memory.cut([small(), small(**own)], CPU, 9)) == 1
    pair = [student(), student().replace(temperature=2, hard_weight=0, teacher=(small(seed=8),))]
    assert len(memory.cut(pair, CPU, 9)) == 1
    shape = {
        "model": "mlp-17", "dataset": "blobs-with-other-test-labels", "dropout": (0, 0.5),
        "batch_size": 10, "schedule": "cosine", "max_norm": 1.0, "precision": "fp64",
        "validation": True, "epochs": 4, "fraction": 0.5,
    }  # fmt: skip
    for name, value in shape.items():
        assert len(memory.cut([small(), small(**{name: value})], CPU, 9)) == 2
    assert len(memory.cut([small(), student().replace(model="mlp-16")], CPU, 9)) == 2
    assert len(memory.cut([small(seed=seed) for seed in range(600)], CPU, 999)) == 3


@pytest.mark.parametrize(
    "other", [(small(seed=7), small(seed=8)), (small("mlp-9"),), (small(dropout=(0.1, 0.2)),)]
)
def test_teachers_that_see_each_batch_are_each_students_own(
    monkeypatch: pytest.MonkeyPatch, home: Path, other: tuple[Recipe, ...]
) -> None:
    """A stack of teachers takes them all for what the first one is."""
    first = student(jitter=1, precision="fp64")
    students = [first, first.replace(teacher=other)]
    assert len(memory.cut(students, CPU, 9)) == 2
    without_jitter = [one.replace(jitter=0) for one in students]
    assert len(memory.cut(without_jitter, CPU, 9)) == 1
    together = kdlib.train_all(students, "cpu", stack=2)
    alone = elsewhere(monkeypatch, home, students)
    # The teachers of the first case are a stack, which rounds differently.
    assert max(map(gap, together, alone)) < 1e-5


def test_a_cut_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    memory.cut([small(**MIXED)], CPU)
    assert torch.equal(torch.rand(1), expected)


class TinyNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(-3), nn.Linear(64, 10))


def test_a_run_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "needed", lambda *_: 2**60)
    with pytest.raises(MemoryError, match=r"'mlp-16' at batch_size=20 needs about .* GiB, more"):
        kdlib.train(small(), "cpu")


def test_a_group_is_cut_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "needed", lambda *_: total // 5)  # two thirds hold three
    recipes = [small(seed=seed) for seed in range(7)]
    assert [len(members) for members in memory.cut(recipes, CPU, 99)] == [3, 3, 1]


def test_memory_is_that_of_the_recipes_own_data_and_precision() -> None:
    """Images of another size, a network for them: the plan must not ask for 28 x 28."""
    images, labels, test_images, test_labels = blobs()
    data.register("tiny", lambda: (images[:, :8, :8], labels, test_images[:, :8, :8], test_labels))
    models.register("tiny", TinyNet)
    recipe = Recipe("tiny", dataset="tiny", steps=2, batch_size=8)
    assert kdlib.train(recipe, "cpu").metrics["status"] == "ok"
    single, double = (memory.needed(small(precision=p), CPU) for p in ("fp32", "fp64"))
    assert single < double <= 2 * single
    assert memory.needed(recipe, CPU) < single
    alone, seven = (memory.planned(recipe, runs, CPU) for runs in (1, 7))
    assert seven - alone == 6 * memory.needed(recipe, CPU)
    taught = [small("mlp-8", jitter=j).distil(small("mlp-500"), temperature=2) for j in (0, 1)]
    # Its teacher's first layer alone, three times.
    assert memory.needed(taught[1], CPU) - memory.needed(taught[0], CPU) > 3 * 4 * 784 * 500
    larger = memory.planned(Recipe("mlp-16", dataset="mnist-5k"), 0, CPU)
    smaller = alone - memory.needed(recipe, CPU)
    pixels = 64 * (len(images) + len(test_images))
    assert larger - smaller == 2 * (5000 * 784 - pixels)


DIFFERENT = {
    "plain": [small(seed=s, learning_rate=r, precision="fp64")
              for s, r in ((0, 0.05), (1, 0.1), (2, 0.02))],
    "own subsets": [
        small(steps=30, precision="fp64", momentum=0.5),
        small(steps=30, precision="fp64", fraction=0.4, subset_seed=2, jitter=2),
        small(steps=30, precision="fp64", omit=(3,), max_norm=None, momentum=0.0),
    ],
    "one teacher each, moved images": [
        small("lenet-half", precision="fp64", jitter=j, seed=j, steps=20)
        .distil(small(precision="fp64", seed=40 + j), temperature=4.0, hard_weight=0.5)
        for j in (1, 2)
    ],
}  # fmt: skip
TAUGHT = [
    small("mlp-12", precision="fp64", seed=1, learning_rate=0.02).distil(
        small(precision="fp64", seed=50 + number), temperature=temperature, hard_weight=hard
    )
    for number, (temperature, hard) in enumerate([(3.3, 0.1), (1.7, 0.9), (20.0, 0.0)])
]


def alone_and_stacked(home: Path, monkeypatch: pytest.MonkeyPatch, recipes: list[Recipe]) -> float:
    alone = kdlib.train_all(recipes, "cpu")
    stacked = elsewhere(monkeypatch, home, recipes, stack=len(recipes))
    for one, other in zip(alone, stacked, strict=True):
        assert one.metrics == other.metrics
        if one.curves["step"] == other.curves["step"]:  # the first run's epoch is the stack's
            losses_of = [run.curves["train_loss"] for run in (one, other)]
            np.testing.assert_allclose(*losses_of, rtol=1e-6)
    return max(gap(one, other) for one, other in zip(alone, stacked, strict=True))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_stack_and_single_agree_in_float64(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert alone_and_stacked(home, monkeypatch, DIFFERENT[kind]) < 1e-10


def test_stack_and_single_agree_in_float64_with_a_temperature_each(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alone_and_stacked(home, monkeypatch, TAUGHT) < 1e-10


def test_dropout_differs_from_run_to_run_of_a_stack() -> None:
    """Neither the run beside it nor its place decides what a run is, only its recipe's class."""
    twins = [small(dropout=(0.0, 0.5), learning_rate=rate) for rate in (0.05, 0.05 + 1e-9)]
    first, second = kdlib.train_all(twins, "cpu", stack=2)
    assert gap(first, second) > 1e-3
    calm = [twin.replace(dropout=(0.0, 0.0)) for twin in twins]
    assert gap(*kdlib.train_all(calm, "cpu", stack=2)) < 1e-4


# --- divergence


def test_a_diverged_run_is_stored_as_diverged(trained: list[float]) -> None:
    run = kdlib.train(small(learning_rate=1e30), "cpu")
    assert run.metrics["status"] == "diverged"
    assert not math.isfinite(run.curves["train_loss"][-1])
    assert len(trained) < 60
    again = kdlib.train(small(learning_rate=1e30), "cpu")
    assert (again.cached, again.metrics) == (True, run.metrics)
    assert [entry.status for entry in store.stored()] == ["diverged"]
    assert evaluate.spread([run, again]).diverged == 2


def test_a_run_that_diverges_in_a_stack_spoils_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [small(seed=s, precision="fp64") for s in range(3)]
    ruined = [*whole[:2], whole[2].replace(learning_rate=1e200)]
    got = kdlib.train_all(ruined, "cpu", stack=3)
    assert [run.metrics["status"] for run in got] == ["ok", "ok", "diverged"]
    beside = elsewhere(monkeypatch, home, whole, stack=3)
    for mine, theirs in zip(got[:2], beside, strict=False):
        assert same_bits(mine, theirs)
        assert mine.curves["step"] == [12, 24, 36, 48, 60]


class Biased(nn.Module):
    """A network that gives class 0 always, or never class 3."""

    def __init__(self, never: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        bias = torch.zeros(10)
        if never is None:
            bias[0] = 1e6
        else:
            bias[never] = -1e6
        self.bias = bias

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(-3)) + self.bias


def always() -> nn.Module:
    return Biased()


def never_three() -> nn.Module:
    return Biased(3)


def test_a_constant_prediction_is_a_divergence_and_a_dead_class_is_none() -> None:
    models.register("always", always)
    models.register("never-three", never_three)
    rate = {"learning_rate": 1e-3, "steps": 40}
    constant, dead = kdlib.train_all([small("always", **rate), small("never-three", **rate)], "cpu")
    assert math.isfinite(constant.curves["train_loss"][-1])
    assert constant.metrics["status"] == "diverged"
    assert constant.metrics["test_errors"] == 54  # it still says what it answers
    assert dead.metrics["status"] == "ok"
    assert 3 not in dead.logits("test").argmax(-1)


def test_a_loss_that_is_not_finite_is_a_divergence_whatever_the_answers() -> None:
    recipe = small()
    network = kdlib.train(recipe, "cpu").model()
    for last, status in ((math.inf, "diverged"), (math.nan, "diverged"), (0.5, "ok")):
        curves = {"train_loss": [0.7, last]}
        assert group._metrics(network, recipe, CPU, curves)["status"] == status


def test_one_class_alone_is_no_divergence() -> None:
    run = kdlib.train(small(omit=tuple(range(1, 10)), steps=20), "cpu")
    assert run.metrics["status"] == "ok"
    assert run.logits("test").argmax(-1).tolist() == [0] * 60


# --- mistakes of public code


def test_bug_the_test_set_used_to_pick() -> None:
    """Other test labels: the same weights, the same validation errors, the same choice."""
    rates = (0.001, 0.05, 0.3)

    def grid(dataset: str) -> list[kdlib.Run]:
        recipes = [
            small(dataset=dataset, validation=True, learning_rate=rate, epochs=2) for rate in rates
        ]
        return kdlib.train_all(recipes, "cpu")

    honest, shuffled = grid("blobs"), grid("blobs-with-other-test-labels")
    for one, other in zip(honest, shuffled, strict=True):
        assert gap(one, other) == 0
        assert one.curves == other.curves  # no test errors in them
        assert one.metrics["validation_errors"] == other.metrics["validation_errors"]
    chosen = evaluate.best(honest)
    assert chosen.recipe.learning_rate == evaluate.best(shuffled).recipe.learning_rate
    assert chosen.recipe.learning_rate != 0.001
    picked = min(shuffled, key=lambda run: run.metrics["test_errors"])
    assert picked.metrics["test_errors"] != chosen.metrics["test_errors"]


def test_bug_the_best_saved_and_the_last_reported() -> None:
    """One set of weights and its errors: the last one's, where another had been better."""
    data.register("blobs", lambda: blobs(noise=300))
    recipes = [small(epochs=15, schedule="constant", seed=seed) for seed in range(3)]
    dataset = data.load("blobs", "cpu")
    made = kdlib.train_all(recipes, "cpu")
    for run in [*made, *kdlib.train_all(recipes, "cpu")]:
        errors = int((answers(run, dataset.test) != dataset.test.labels).sum())
        assert run.metrics["test_errors"] == run.curves["test_errors"][-1] == errors
    assert any(min(run.curves["test_errors"]) < run.metrics["test_errors"] for run in made)


def test_bug_tensorboard_scalars_under_one_tag_and_one_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipes = [small(validation=True), small(seed=1)]
    made = kdlib.train_all(recipes, "cpu", log_dir=tmp_path / "logs")
    folders = sorted((tmp_path / "logs").iterdir())
    assert len(folders) == 2  # a run a folder
    for run in made:
        (folder,) = (path for path in folders if run.recipe.key in path.name)
        events = EventAccumulator(str(folder)).Reload()
        names = {name.replace("_", "/", 1): name for name in run.curves if name != "step"}
        assert set(events.Tags()["scalars"]) == set(names)
        assert len(names) == 3
        for tag, name in names.items():
            scalars = events.Scalars(tag)
            assert [scalar.step for scalar in scalars] == run.curves["step"]
            values = [scalar.value for scalar in scalars]
            np.testing.assert_allclose(values, run.curves[name], rtol=1e-6)


def test_without_tensorboard_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"log_dir needs TensorBoard.*pip install"):
        kdlib.train(small(), "cpu", tmp_path)
    assert trained == []


def test_a_stored_run_is_logged_too(tmp_path: Path) -> None:
    kdlib.train(small(), "cpu")
    assert kdlib.train(small(), "cpu", log_dir=tmp_path / "logs").cached
    assert len(list((tmp_path / "logs").rglob("events.*"))) == 1


# --- what a run is stored under


def test_other_data_is_another_run(home: Path) -> None:
    first = kdlib.train(small(), "cpu")
    taught = kdlib.train(small("mlp-12", dataset="mnist-5k", steps=2).distil(
        small(), temperature=2), "cpu")  # fmt: skip
    data.register("blobs", lambda: blobs(noise=61))
    second = kdlib.train(small(), "cpu")
    assert not second.cached
    assert gap(first, second) > 0
    again = kdlib.train(taught.recipe, "cpu")
    assert not again.cached  # what its teacher has seen counts


@pytest.mark.parametrize("name", ["run.json", "weights.safetensors"])
def test_a_damaged_run_is_made_anew(trained: list[float], name: str) -> None:
    first = kdlib.train(small(), "cpu")
    (path,) = store.folder().glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged: it is trained again"):
        second = kdlib.train(small(), "cpu")
    assert not second.cached
    assert len(trained) == 120
    assert same_bits(first, second)
    assert kdlib.train(small(), "cpu").cached


class Tied(nn.Module):
    """Two layers with one weight, and buffers that are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(784, 784), nn.Linear(784, 784)
        self.second.weight = self.first.weight
        shifts = torch.arange(20.0).view(2, 10)
        self.register_buffer("shifts", shifts)
        self.register_buffer("shift", shifts[1])
        self.head = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(images.flatten(-3))))
        return self.head(hidden) + 0.01 * self.shift


def test_tied_weights_and_views_are_stored_and_come_back_tied(trained: list[float]) -> None:
    models.register("tied", Tied)
    first = kdlib.train(small("tied", epochs=1), "cpu")
    again = kdlib.train(small("tied", epochs=1), "cpu")
    assert (first.cached, again.cached, len(trained)) == (False, True, 12)
    assert same_bits(first, again)
    network: Any = again.model()
    assert network.first.weight is network.second.weight
    assert len(again.weights) == 8
    test = data.load("blobs", "cpu").test
    assert int((answers(again, test) != test.labels).sum()) == first.metrics["test_errors"]


# --- interrupted


TRIO = [small(seed=seed, learning_rate=0.02 * (1 + seed), **MIXED) for seed in range(3)]
INTERRUPTED: dict[str, tuple[list[Recipe], int | None]] = {
    "alone": ([small(**MIXED)], None),
    "taught": ([student(jitter=1), student()], None),
    "stacked": (TRIO, 3),
}


def work_and_die(name: str, deed: str, number: int) -> None:
    """In a process of its own: train, and be killed at the n-th of some deeds of the store."""
    runs.CHECKPOINT_SECONDS = 0
    left = [number]
    real: Callable[..., Any] = getattr(store, deed) if deed != "replace" else os.replace

    def act(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and deed == "replace":
            os.kill(os.getpid(), signal.SIGKILL)  # before the file has its name
        done = real(*arguments)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(os if deed == "replace" else store, deed, act)
    recipes, stack = INTERRUPTED[name]
    kdlib.train_all(recipes, "cpu", stack=stack)


@pytest.mark.parametrize(
    ("name", "deed", "number", "left"),
    [
        ("alone", "save_checkpoint", 1, 48),
        ("alone", "save_checkpoint", 4, 12),
        ("alone", "replace", 3, 36),  # its third checkpoint never got its name
        ("alone", "replace", 5, 12),  # nor did the run
        ("alone", "write", 1, 0),  # stored, the checkpoint not yet dropped
        ("taught", "save_checkpoint", 6, 96),  # the teacher's four, two of the first student
        ("stacked", "save_checkpoint", 2, 36),
        ("stacked", "write", 1, 12),  # one of three stored
        ("stacked", "write", 3, 0),
    ],
)
def test_kill_9_and_the_same_call_again_goes_on_from_the_checkpoint(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: list[float],
    name: str,
    deed: str,
    number: int,
    left: int,
) -> None:
    recipes, stack = INTERRUPTED[name]
    assert exit_codes(process(work_and_die, name, deed, number)) == [-signal.SIGKILL]
    got = kdlib.train_all(recipes, "cpu")  # the cut of the group is the interrupted one
    assert len(trained) == left
    if left in (12, 36, 48):
        assert min(trained) == pytest.approx(1 - left / 60)
    whole = elsewhere(monkeypatch, home, recipes, stack=stack)
    assert len(trained) > left
    for mine, theirs in zip(got, whole, strict=True):
        assert same_bits(mine, theirs)
    kept = [run.cached for run in kdlib.train_all(recipes, "cpu")]
    assert kept == [True] * len(recipes)
    assert [path.name for path in (store.folder() / ".checkpoints").iterdir()] == []


def test_a_run_that_is_stored_is_not_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process killed while it writes one of a stack's runs again would lose it."""
    assert exit_codes(process(work_and_die, "stacked", "write", 2)) == [-signal.SIGKILL]
    there = {entry.key for entry in store.stored()}
    written, write = [], store.write
    monkeypatch.setattr(store, "write", lambda key, *rest: written.append(key) or write(key, *rest))
    recipes, stack = INTERRUPTED["stacked"]
    kdlib.train_all(recipes, "cpu", stack=stack)
    assert len(there) == 2
    assert len(written) == 1
    assert not there & set(written)


def test_runs_that_another_process_prunes_are_made_again(
    monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    write, pruned = store.write, list[str]()

    def write_and_lose(key: str, *rest: Any) -> Any:
        written = write(key, *rest)
        if len(pruned) < often:
            store.prune([key])
            pruned.append(key)
        return written

    monkeypatch.setattr(store, "write", write_and_lose)
    often = 2
    (run,) = kdlib.train_all([small()], "cpu")
    assert (run.cached, len(trained), len(pruned)) == (False, 3 * 60, 2)
    often = 99
    with pytest.raises(store.StoreError, match=r"runs vanish from .*another process prunes them"):
        kdlib.train(small(seed=1), "cpu")


def test_an_exception_in_the_middle_keeps_what_was_done(
    monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    """Ctrl-C: the run that was finished is stored, the other goes on from its checkpoint."""
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    save, seen = store.save_checkpoint, []

    def interrupted(*arguments: Any) -> None:
        save(*arguments)
        seen.append(arguments)
        if len(seen) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kdlib.train_all([small(seed=0), small(seed=1)], "cpu")
    assert len(trained) == 60 + 24
    monkeypatch.setattr(store, "save_checkpoint", save)
    first, second = kdlib.train_all([small(seed=0), small(seed=1)], "cpu")
    assert (first.cached, second.cached) == (True, False)
    assert len(trained) == 120


def test_checkpoints_come_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(store, "save_checkpoint", lambda *arguments: saved.append(arguments))
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", math.inf)
    kdlib.train(small(), "cpu")
    assert saved == []
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    kdlib.train(small(seed=1), "cpu")
    assert len(saved) == 4  # each report but the last


def test_a_checkpoint_from_other_code_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    process_ends = exit_codes(process(work_and_die, "alone", "save_checkpoint", 3))
    assert process_ends == [-signal.SIGKILL]
    with monkeypatch.context() as patch:
        patch.setattr(keys, "code_digest", lambda: "other code")
        with pytest.warns(UserWarning, match=r"other training code.*not used.*runs --prune"):
            kdlib.train(INTERRUPTED["alone"][0][0], "cpu")
    assert len(trained) == 60
    assert len(store.unfinished()) == 1  # it is the old code's, which may come back
    kdlib.train(INTERRUPTED["alone"][0][0], "cpu")
    assert len(trained) == 60 + 24


def test_a_damaged_checkpoint_is_left_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, trained: list[float]
) -> None:
    assert exit_codes(process(work_and_die, "alone", "save_checkpoint", 3)) == [-signal.SIGKILL]
    (path,) = (store.folder() / ".checkpoints").glob("*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    recipes, _ = INTERRUPTED["alone"]
    with pytest.warns(UserWarning, match="the checkpoint .* is damaged"):
        (got,) = kdlib.train_all(recipes, "cpu")
    assert len(trained) == 60
    assert same_bits(got, *elsewhere(monkeypatch, home, recipes))


def test_a_byte_changed_in_a_checkpoint_gives_no_other_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_codes(process(work_and_die, "alone", "save_checkpoint", 3)) == [-signal.SIGKILL]
    (path,) = (store.folder() / ".checkpoints").glob("*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 64  # among the weights
    path.write_bytes(content)
    recipes, _ = INTERRUPTED["alone"]
    with pytest.warns(UserWarning, match="damaged"):
        (got,) = kdlib.train_all(recipes, "cpu")
    assert same_bits(got, *elsewhere(monkeypatch, home, recipes))


def test_a_full_disk_loses_no_run(monkeypatch: pytest.MonkeyPatch, trained: list[float]) -> None:
    kdlib.train(small(), "cpu")
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(store.StoreError, match=r"No space left.*make room"):
            kdlib.train(small(seed=1), "cpu")
    assert len(store.stored()) == 1
    assert kdlib.train(small(), "cpu").cached
    assert not kdlib.train(small(seed=1), "cpu").cached


# --- two processes


def train_beside(arrived: Any, trainings: Any, results: Any) -> None:
    """In a process of its own: train once the other one wants to train the same."""
    locked, train = store.locked, group.train

    def counted(keys: Any) -> Any:
        with arrived.get_lock():
            arrived.value += 1
        return locked(keys)

    def slow(*arguments: Any) -> Any:
        while arrived.value < 2:
            time.sleep(0.01)
        with trainings.get_lock():
            trainings.value += 1
        return train(*arguments)

    store.locked, group.train = counted, slow
    run = kdlib.train(small(**MIXED), "cpu")
    results.put((run.cached, run.metrics, {n: w.numpy() for n, w in run.weights.items()}))


def test_of_two_processes_that_want_one_run_one_trains() -> None:
    arrived, trainings = FORKS.Value("i", 0), FORKS.Value("i", 0)
    results = FORKS.Queue()
    both = [process(train_beside, arrived, trainings, results) for _ in range(2)]
    (first, second) = sorted((results.get(timeout=300) for _ in both), key=lambda got: got[0])
    assert exit_codes(*both) == [0, 0]
    assert (trainings.value, arrived.value) == (1, 2)
    assert (first[0], second[0]) == (False, True)
    assert first[1] == second[1]
    for name, weight in first[2].items():
        np.testing.assert_array_equal(weight, second[2][name])
    here = kdlib.train(small(**MIXED), "cpu")
    assert here.cached
    np.testing.assert_array_equal(here.weights["layers.2.bias"], first[2]["layers.2.bias"])


def test_a_teacher_answers_once_for_all_students_of_a_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, scored = small(seed=77), []
    predict = loop.predict

    def counted(model: nn.Module, inputs: Tensor, *rest: Any) -> Tensor:
        scored.append((len(next(model.parameters())), len(inputs)))  # hidden units, samples
        return predict(model, inputs, *rest)

    students = [
        small("mlp-8", seed=seed).distil(teacher, temperature=temperature)
        for seed in range(2)
        for temperature in (2, 4)
    ]
    kdlib.train(teacher, "cpu")
    monkeypatch.setattr(loop, "predict", counted)
    alone = [run.weights for run in (kdlib.train(student, "cpu") for student in students[:1])]
    store.prune([entry.key for entry in store.stored() if entry.recipe["teacher"]])
    runs = kdlib.train_all(students, "cpu", stack=1)
    everything = len(data.load("blobs", "cpu").full)
    assert scored.count((16, everything)) == 1  # else once a student, or once a call
    assert all(torch.equal(alone[0][name], weight) for name, weight in runs[0].weights.items())
