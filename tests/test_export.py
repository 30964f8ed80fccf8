"""`kdlib export`: what it writes gives PyTorch's answers, and what it refuses leaves no file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import kdlib
from kdlib import data, export, models, store
from kdlib.book import cli

NAME = "mnist-small-plain-student"


def answers(path: Path, images: Tensor) -> Tensor:
    """The logits of a file as another program would get them: without kdlib."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return data.load("mnist-5k", "cpu").test.images


@pytest.fixture(scope="module")
def stored() -> dict[str, kdlib.Run]:
    """One small run of each kind of layer, in the store."""
    shared: dict[str, Any] = {"dataset": "mnist-5k", "steps": 60}
    kinds = ("mlp-16", "lenet", "lenet-half")
    runs = kdlib.train_all([kdlib.Recipe(kind, **shared) for kind in kinds], "cpu")
    return dict(zip(kinds, runs, strict=True))


def key(run: kdlib.Run) -> str:
    (found,) = [e.key for e in store.stored() if e.recipe == run.recipe.as_dict()]
    return found


@pytest.mark.parametrize("kind", ["mlp-16", "lenet", "lenet-half"])
def test_a_stored_network_gives_pytorchs_logits(
    kind: str, stored: dict[str, kdlib.Run], digits: Tensor, tmp_path: Path
) -> None:
    """From raw bytes, for batches of any size, one digit included."""
    written = tmp_path / "out.onnx"
    assert cli.main(["export", key(stored[kind])[:12], str(written)]) == 0
    expected = stored[kind].logits()
    for count in (1, 7, 1000):
        torch.testing.assert_close(
            answers(written, digits[:count]), expected[:count], rtol=1e-4, atol=1e-3
        )


def test_a_pretrained_network_is_written_with_8_bits_in_a_third_of_the_bytes(
    digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    assert cli.main(["export", NAME, str(whole)]) == 0
    assert cli.main(["export", NAME, str(small), "--int8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{whole}: mlp-30x30, fp32, {whole.stat().st_size:,} bytes")
    assert small.stat().st_size < whole.stat().st_size / 3
    expected = kdlib.pretrained(NAME, "cpu").logits("test", "mnist-5k").argmax(1)
    same = int((answers(small, digits).argmax(1) == expected).sum())
    assert 980 < same <= 1000
    assert f"PyTorch's answer on {same:,} of 1,000 images" in second


def test_a_file_has_no_path_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    assert cli.main(["export", NAME, str(tmp_path / "out.onnx")]) == 0
    content = (tmp_path / "out.onnx").read_bytes()
    assert b".py" not in content
    assert str(Path(kdlib.__file__).parent).encode() not in content


@pytest.mark.parametrize("calibrated", [False, True])
def test_convolutions_are_quantised_only_if_named(calibrated: bool, digits: Tensor) -> None:
    content = export.to_onnx(models.build("lenet"))
    images = digits[:200] if calibrated else None
    # onnxruntime's names: a dynamic convolution, and int8 weights with their scales.
    whole, linear = export.quantised(content, images, ["Conv"]), export.quantised(content, images)
    assert (b"ConvInteger" in whole) is not calibrated
    assert b"ConvInteger" not in linear
    assert len(linear) < len(whole)  # most of the weights are in the linear layers


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line of a refused export, which has left its folder as it was."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["export", *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    return line


def test_names_that_are_no_networks_are_refused(
    stored: dict[str, kdlib.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.onnx")
    line = refusal(capsys, tmp_path, "mnist-techer", out)
    assert "'mnist-techer' is neither pretrained nor stored" in line
    assert "mnist-teacher" in line
    assert "is neither" in refusal(capsys, tmp_path, "", out)
    one = key(stored["mlp-16"])
    store.write("0" * 24, *store.read(one) or ({}, {}))
    store.write("0" * 23 + "1", *store.read(one) or ({}, {}))
    assert "'0000' is the start of 2 keys" in refusal(capsys, tmp_path, "0000", out)
    weights = store.folder() / ("0" * 24) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is damaged: train it again" in refusal(capsys, tmp_path, "0" * 24, out)
    record, values = store.read("0" * 23 + "1") or ({}, {})
    store.write("0" * 23 + "1", record | {"metrics": {"status": "diverged"}}, values)
    assert "is diverged: train it again" in refusal(capsys, tmp_path, "0" * 23 + "1", out)
    store.prune(["0" * 24, "0" * 23 + "1"])


def test_places_that_cannot_be_written_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "no" / "out.onnx"
    assert f"the folder is {str(nowhere.parent)!r}" in refusal(capsys, tmp_path, NAME, str(nowhere))
    there = tmp_path / "out.onnx"
    there.write_text("mine")
    assert "--force to replace it" in refusal(capsys, tmp_path, NAME, str(there))
    assert cli.main(["export", NAME, str(there), "--force"]) == 0
    assert there.read_bytes()[:4] != b"mine"


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    line = refusal(capsys, tmp_path, NAME, str(tmp_path / "out.onnx"))
    assert "onnxscript" in line
    assert "in a clone, pip install '.[export]'" in line


class Undecided(nn.Module):
    """What no exporter can write down: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if images.sum() > 0 else -logits


def test_a_network_that_cannot_be_exported_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match="PyTorch cannot export Undecided: ") as found:
        export.to_onnx(Undecided())
    assert len(str(found.value).splitlines()) == 1


def test_a_file_with_other_answers_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter, or the quantiser, had made a mistake."""
    right = export.logits
    monkeypatch.setattr(export, "logits", lambda *given: right(*given) * 1.001)
    out = str(tmp_path / "out.onnx")
    assert "differ from PyTorch's by" in refusal(capsys, tmp_path, NAME, out)
    monkeypatch.setattr(export, "logits", lambda *given: right(*given).roll(1, 1))
    assert "images only: not written" in refusal(capsys, tmp_path, NAME, out, "--int8")
    missing = torch.full((1000, 10), float("nan"))
    monkeypatch.setattr(export, "logits", lambda *given: missing)
    assert "differ from PyTorch's by nan" in refusal(capsys, tmp_path, NAME, out)


def test_a_static_range_is_that_of_the_calibration_images(digits: Tensor) -> None:
    """Calibrated on blank paper, a network cannot tell digits; calibrated on digits, it can."""
    run = kdlib.pretrained(NAME, "cpu")
    content, expected = export.to_onnx(run.model()), run.logits("test", "mnist-5k").argmax(1)

    def same(images: Tensor) -> float:
        found = export.logits(export.quantised(content, images), digits).argmax(1)
        return float(np.mean((found == expected).numpy()))

    assert same(digits[::5]) > 0.97
    assert same(torch.zeros_like(digits[:100])) < 0.6
