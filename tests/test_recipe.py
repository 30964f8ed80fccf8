"""Recipes: every bad value refused by name, and a key that says what decides a run."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdlib
from kdlib import Recipe

ROOT = Path(__file__).resolve().parent.parent
calm = settings(deadline=None, max_examples=60, derandomize=True)
NAN, INF = math.nan, math.inf
TEACHER = Recipe("mlp-1200x1200", jitter=2)
BAD: dict[str, list[Any]] = {
    "model": [None, 800, ("mlp-8",)],
    "dataset": ["mnits", None, 5, ["mnist"]],
    "epochs": [0, -1, NAN, INF, "10", None, True],
    "steps": [0, -1, 1.5, "10", True, np.True_],
    "batch_size": [0, -64, 64.0, "64", True, None],
    "learning_rate": [0, -0.1, NAN, INF, "0.1", None, [0.1]],
    "momentum": [-0.1, 1, 1.5, NAN, "0.9", None, True],
    "schedule": ["onecycle", None, 1],
    "dropout": [0.5, (0.5,), (0.2, 0.5, 0.5), (0.2, 1), (-0.1, 0.5), ("0", "0"), (0, NAN), None],
    "max_norm": [0, -1, NAN, INF, "15", True],
    "jitter": [-1, 28, 1.0, "2", True, None],
    "fraction": [0, -0.1, 1.1, NAN, "1", None, True],
    "omit": [3, (-1,), (3.0,), ("3",), None, (True,)],
    "subset_seed": [-1, 0.5, None, True, 2**63],
    "validation": [0, 1, None, "False", np.int64(1)],
    "teacher": ["mlp-8", ("mlp-8",), None, (TEACHER, None)],
    "temperature": [0, -1, NAN, INF, "4", None, True, 1.1e6],
    "hard_weight": [-0.1, 1.1, NAN, "0.5", None, True],
    "precision": ["fp16", None, 32],
    "seed": [-1, 1.5, None, "0", True, 2**63],
    "label_smoothing": [-0.1, 1, NAN, "0.1", None, True],
}
OTHER: dict[str, Any] = {
    "model": "mlp-9",
    "dataset": "mnist-5k",
    "epochs": 3,
    "steps": 77,
    "batch_size": 50,
    "learning_rate": 0.3,
    "momentum": 0.5,
    "schedule": "cosine",
    "dropout": (0.2, 0.5),
    "max_norm": 3.5,
    "jitter": 2,
    "fraction": 0.5,
    "omit": (3,),
    "subset_seed": 1,
    "validation": True,
    "teacher": (TEACHER, TEACHER.replace(seed=1)),
    "temperature": 4,
    "hard_weight": 0.5,
    "precision": "bf16",
    "seed": 1,
    "label_smoothing": 0.1,
}


def test_each_field_is_tried() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert set(BAD) == set(OTHER) == names


def test_a_value_of_any_kind_is_refused_in_one_line() -> None:
    class Unspeakable:
        def __repr__(self) -> str:
            raise RuntimeError("no words for it")

    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    for value in (torch.ones(40, 40), np.ones((40, 40)), 10**5000, nested, Unspeakable()):
        with pytest.raises(ValueError, match=r"^seed is [^\n]*: expected a whole number[^\n]*$"):
            Recipe("mlp-8", seed=value)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    fields = {"model": "mlp-8", "teacher": TEACHER, field: value}
    shown = re.escape(repr(tuple(value) if isinstance(value, list) and field == "omit" else value))
    with pytest.raises(ValueError, match=f"^{field} is {shown}: expected "):
        Recipe(**fields)
    if field != "model":
        with pytest.raises(ValueError, match=f"^{field} is "):
            Recipe("mlp-8", teacher=(TEACHER,)).replace(**{field: value})


def test_a_model_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'mlp-800x': expected mlp-WxW .*lenet"):
        Recipe("mlp-800x")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout is \(0.2, 0.5\): .* model 'lenet' has none"):
        Recipe("lenet", dropout=(0.2, 0.5))
    with pytest.raises(ValueError, match=r"hard_weight is 0.5: .* without a teacher, or .*distil"):
        Recipe("lenet", hard_weight=0.5)
    with pytest.raises(ValueError, match=r"distil\(\) got no teacher"):
        Recipe("lenet").distil(temperature=4)


def test_a_field_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="'lr'"):
        Recipe("lenet").replace(lr=0.1)
    with pytest.raises(TypeError, match="alpha"):
        Recipe("lenet", alpha=0.1)  # type: ignore[call-arg]


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe("lenet")
    assert recipe == Recipe("lenet")
    assert hash(recipe) == hash(Recipe("lenet"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    assert recipe.replace(seed=1).seed == 1
    assert recipe.seed == 0


def test_distil_adds_teachers_and_nothing_else() -> None:
    student = Recipe("mlp-30x30", learning_rate=0.03, seed=5)
    taught = student.distil(TEACHER, TEACHER.replace(seed=1), temperature=4, hard_weight=0.1)
    assert taught.teacher == (TEACHER, TEACHER.replace(seed=1))
    assert (taught.temperature, taught.hard_weight) == (4, 0.1)
    assert taught.replace(teacher=(), temperature=1.0, hard_weight=1.0) == student
    assert student.distil(TEACHER, temperature=8).hard_weight == 0  # soft targets alone
    again = taught.replace(model="mlp-8").distil(taught, temperature=2)
    assert again.teacher[0].teacher == taught.teacher  # a student may teach


def test_lists_as_papermill_gives_them() -> None:
    listed = Recipe("mlp-8", dropout=[0.2, 0.5], omit=[3], teacher=[TEACHER])  # type: ignore[arg-type]
    assert listed == Recipe("mlp-8", dropout=(0.2, 0.5), omit=(3,), teacher=(TEACHER,))
    assert Recipe("mlp-8", teacher=TEACHER).teacher == (TEACHER,)  # type: ignore[arg-type]
    assert hash(listed)


@pytest.mark.parametrize("field", OTHER)
def test_each_field_decides_the_key(field: str) -> None:
    # A temperature needs a teacher, smoothed labels allow none.
    teacher = () if field == "label_smoothing" else (TEACHER,)
    before = Recipe("mlp-8", teacher=teacher)
    after = before.replace(**{field: OTHER[field]})
    assert re.fullmatch("[0-9a-f]{16}", before.key)
    assert before.key != after.key
    assert before.key == Recipe("mlp-8", teacher=teacher).key


def test_a_teachers_field_decides_the_key() -> None:
    keys = {
        Recipe("mlp-8").distil(teacher, temperature=4).key
        for teacher in (TEACHER, TEACHER.replace(seed=1), TEACHER.distil(TEACHER, temperature=2))
    }
    pair = TEACHER, TEACHER.replace(seed=1)
    keys |= {Recipe("mlp-8").distil(*order, temperature=4).key for order in (pair, pair[::-1])}
    assert len(keys) == 5


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(math.ceil(low), math.floor(high))


plain = st.builds(
    Recipe,
    model=st.sampled_from(["mlp-8", "mlp-30x30"]),
    dataset=st.sampled_from(["mnist", "mnist-5k"]),
    epochs=number(0.1, 100),
    steps=st.none() | st.integers(1, 1000),
    learning_rate=number(0.01, 10),
    momentum=number(0, 0.99),
    dropout=st.tuples(number(0, 0.9), number(0, 0.9)),
    jitter=st.integers(0, 3),
    fraction=number(0.01, 1),
    omit=st.sampled_from([(), (3,), (7, 8)]),
    max_norm=st.none() | st.floats(0.1, 9),
    validation=st.booleans(),
    seed=st.integers(0, 2**62),
)


@calm
@given(plain, st.lists(plain, max_size=2), number(0.1, 50), number(0, 1))
def test_a_recipe_comes_back_from_json(
    recipe: Recipe, teachers: list[Recipe], temperature: float, hard: float
) -> None:
    if teachers:
        recipe = recipe.distil(*teachers, temperature=temperature, hard_weight=hard)
    back = Recipe.from_dict(json.loads(json.dumps(recipe.as_dict())))
    assert back == recipe
    assert back.key == recipe.key


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 10.0, "learning_rate": np.float64(2), "momentum": 0.0, "fraction": 1},
        {"dropout": (0.0, 0.0)},
        pytest.param(
            {"max_norm": 4.0},
        ),
    ],
)
def test_equal_recipes_have_equal_keys(change: dict[str, Any]) -> None:
    whole = Recipe("mlp-8", epochs=10, learning_rate=2, momentum=0, dropout=(0, 0), max_norm=4)
    assert whole.replace(**change) == whole
    assert whole.replace(**change).key == whole.key


def test_numpys_numbers_are_numbers() -> None:
    plain = Recipe(
        "mlp-8", epochs=3, steps=7, learning_rate=0.5, dropout=(0, 0.5), omit=(3,), seed=2,
        validation=True,
    )  # fmt: skip
    numpys = Recipe(
        "mlp-8", epochs=np.int64(3), steps=np.int32(7), learning_rate=np.float32(0.5),  # type: ignore[arg-type]
        dropout=np.array([0, 0.5]), omit=np.array([3]), seed=np.uint8(2),  # type: ignore[arg-type]
        validation=np.True_,  # type: ignore[arg-type]
    )  # fmt: skip
    assert numpys == plain
    assert numpys.key == plain.key
    assert repr(numpys) == repr(plain)
    assert json.loads(json.dumps(numpys.as_dict())) == plain.as_dict()


RECORDS = [
    *sorted((ROOT / "book" / "reference").rglob("*.json")),
    *sorted((ROOT / "kdlib" / "pretrained_weights").glob("*.json")),
]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_recipes_read_and_keep_their_keys(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = record.get("rows", {"network": [record]}).values()
    lines = [line for row in rows for line in row]
    fields = [line["recipe"] for line in lines if line.get("recipe")]
    # A row of plain values has no recipe, but seeds; some records have no other rows.
    assert fields or all(line["seed"] is not None for line in lines)
    for recorded in fields:
        text = json.dumps(recorded, sort_keys=True)
        assert Recipe.from_dict(recorded).key == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("omit", [(8, 7), (7, 8, 7)])
def test_recipes_of_one_key_are_equal(omit: tuple[int, ...]) -> None:
    recipe = Recipe("mlp-8", omit=(7, 8))
    assert recipe.replace(omit=omit).key == recipe.key
    assert recipe.replace(omit=omit) == recipe


def test_registered_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdlib.data, "_registered", {})
    with pytest.raises(ValueError, match="dataset is 'mine': expected the name of a dataset"):
        Recipe("lenet", dataset="mine")
    kdlib.data.register("mine", lambda: pytest.fail("a recipe loads nothing"))
    assert Recipe("lenet", dataset="mine").dataset == "mine"


def test_smoothed_labels_are_a_field_that_leaves_other_recipes_their_keys() -> None:
    plain = Recipe("mlp-8")
    assert "label_smoothing" not in plain.as_dict()
    smoothed = plain.replace(label_smoothing=0.1)
    assert smoothed.key != plain.key
    assert Recipe.from_dict(smoothed.as_dict()) == smoothed
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1: expected 0 with a teacher"):
        smoothed.distil(plain, temperature=2)
