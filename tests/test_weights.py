"""Networks that come with kdlib: kept, read with a check, as good as recorded."""

import json
from pathlib import Path

import pytest
import torch

import kdlib
from kdlib import loop, weights


@pytest.fixture(scope="module")
def run() -> kdlib.Run:
    return kdlib.train(kdlib.Recipe("mlp-16", dataset="mnist-5k", epochs=1), "cpu")


def test_what_is_kept_comes_back_rounded(run: kdlib.Run, tmp_path: Path) -> None:
    weights.keep("small", run, tmp_path)
    assert weights.names(tmp_path) == ["small"]
    back = weights.pretrained("small", "cpu", folder=tmp_path)
    assert back.recipe == run.recipe
    assert back.provenance == run.provenance
    assert list(back.weights) == list(run.weights)
    for name, value in run.weights.items():
        assert back.weights[name].dtype == torch.float32
        assert torch.equal(back.weights[name], value.half().float())
    test = kdlib.data.load("mnist-5k", "cpu").test
    counted = loop.count_errors(back.model(), test.images, test.labels)
    assert back.metrics["test_errors"] == counted
    assert back.metrics["test_accuracy"] == 1 - counted / len(test)


def test_a_changed_file_and_an_unknown_name_are_refused(run: kdlib.Run, tmp_path: Path) -> None:
    path = weights.keep("small", run, tmp_path)
    with pytest.raises(ValueError, match="no pretrained 'large': expected one of small"):
        weights.pretrained("large", "cpu", folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="is missing or damaged: reinstall"):
        weights.pretrained("small", "cpu", folder=tmp_path)
    weights.keep("small", run, tmp_path)
    record = tmp_path / "small.json"
    record.write_text(record.read_text().replace('"status": "ok"', '"status": "oh"'))
    with pytest.raises(ValueError, match=r"small.json is damaged: reinstall"):
        weights.pretrained("small", "cpu", folder=tmp_path)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"small.json is damaged: reinstall"):
        weights.pretrained("small", "cpu", folder=tmp_path)
    weights.keep("small", run, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="is missing or damaged: reinstall"):
        weights.pretrained("small", "cpu", folder=tmp_path)


@pytest.mark.usefixtures("real_data")
def test_the_shipped_networks_are_as_good_as_recorded() -> None:
    assert len(weights.names()) == 5
    test = kdlib.data.load("mnist", "cpu").test
    errors = {}
    for name in weights.names():
        run = kdlib.pretrained(name, "cpu")
        errors[name] = loop.count_errors(run.model(), test.images, test.labels)
        assert errors[name] == pytest.approx(run.metrics["test_errors"], abs=2)  # another device
        whole = json.loads((weights.FOLDER / f"{name}.json").read_text())["metrics_before_rounding"]
        assert errors[name] == pytest.approx(whole["test_errors"], abs=3)
    assert errors["mnist-teacher"] < errors["mnist-plain-student"]
    for size in ("", "small-"):
        assert errors[f"mnist-{size}distilled-student"] < errors[f"mnist-{size}plain-student"]


def test_the_store_has_no_part_in_it(run: kdlib.Run, tmp_path: Path) -> None:
    weights.keep("small", run, tmp_path)
    before = kdlib.runs.store.stored()
    weights.pretrained("small", "cpu", folder=tmp_path)
    assert kdlib.runs.store.stored() == before
