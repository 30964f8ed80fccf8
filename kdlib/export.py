"""A trained network as an ONNX file: exported, quantised, compared with PyTorch.

The file takes images as the datasets have them, uint8 (N, height, width), 0 for paper and 255 for
ink, and returns logits, float32 (N, classes), for batches of any size. Dividing by 255 is part of
the file; centring a digit as MNIST does is left to the caller. Introduced in chapter 10.
"""

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import check, data, files, group, loop, store, weights
from kdlib.recipe import Recipe

# The largest difference from PyTorch's logits, relative to the largest logit: rounding alone.
TOLERANCE = 1e-4
# An int8 file that gives another answer more often than this is not written.
LEAST_AGREEMENT = 0.95
# Quantised by default. A dynamically quantised convolution is slower than float32 (chapter 10).
LINEAR = ("MatMul", "Gemm")


class Deployed(nn.Module):
    """A network with its normalisation: uint8 (N, height, width) -> logits (N, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        # As `data.to_input`, without its layout in memory, which would become operators here.
        logits: Tensor = self.network(images.unsqueeze(1).float() / 255)
        return logits


def to_onnx(network: nn.Module, size: Sequence[int] = (28, 28)) -> bytes:
    """The content of an ONNX file with a network and its normalisation.

    size: the images' height and width. Raises ValueError for what PyTorch cannot export.
    """
    deployed = Deployed(network.float().cpu()).eval()
    images = torch.zeros(2, *size, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                deployed, (images,), input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"PyTorch cannot export {type(network).__name__}: {cause}") from error
    model: Any = program.model_proto  # type: ignore[union-attr]
    # The exporter notes the lines of code, with their paths, at every operator and value.
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
    return bytes(model.SerializeToString())


def quantised(
    content: bytes, calibration: Tensor | None = None, operators: Sequence[str] = LINEAR
) -> bytes:
    """An ONNX file's content with int8 weights, by onnxruntime.

    Dynamic: the range of each layer's inputs is measured on every call. With calibration, uint8
    images (N, height, width), static: it is measured once, on them, and written into the file.
    operators: the kinds that are quantised; "Conv" is a convolution.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kinds: dict[str, Any] = {
        "weight_type": quantization.QuantType.QInt8,
        "op_types_to_quantize": list(operators),
    }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, target = (f"{folder}/{name}.onnx" for name in ("a", "b", "c"))
        Path(source).write_bytes(content)
        quant_pre_process(source, prepared)
        if calibration is None:
            quantization.quantize_dynamic(prepared, target, **kinds)
        else:
            kinds |= {"activation_type": quantization.QuantType.QUInt8, "per_channel": True}
            # Else a layer's outputs would be rounded too, before the ReLU and as logits.
            kinds["extra_options"] = {"OpTypesToExcludeOutputQuantization": list(operators)}
            quantization.quantize_static(prepared, target, _Batches(calibration), **kinds)
        return Path(target).read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, as which the exporter and the quantiser report their progress."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Batches:
    """Calibration images as onnxruntime reads them, a hundred at a time."""

    def __init__(self, images: Tensor) -> None:
        self.waiting = iter(images.cpu().split(100))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.waiting, None)
        return None if batch is None else {"images": batch.numpy()}


def session(content: bytes, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU: session.run(None, {"images": array})[0] are logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])


def logits(content: bytes, images: Tensor) -> Tensor:
    """The logits (N, classes) that an ONNX file's content gives for images."""
    found = session(content, torch.get_num_threads()).run(None, {"images": images.cpu().numpy()})[0]
    return torch.from_numpy(found)


def find(name: str) -> tuple[Recipe, nn.Module]:
    """A trained network with its recipe: a pretrained one, or a run by the start of its key.

    Raises ValueError for a name that is no network's, several runs', or a damaged run's.
    """
    if name in weights.names():
        run = weights.pretrained(name, "cpu")
        return run.recipe, run.model()
    keys = [entry.key for entry in store.stored() if name and entry.key.startswith(name)]
    if len(keys) != 1:
        many = f"is the start of {len(keys)} keys" if keys else "is neither pretrained nor stored"
        names = ", ".join(weights.names())
        raise ValueError(f"{name!r} {many}: expected {names}, or a key that `kdlib runs` lists")
    with _quiet():  # A damaged run would announce a training, which there is not.
        found = store.read(keys[0])
    if found is None or found[0]["metrics"]["status"] != "ok":
        state = "damaged" if found is None else "diverged"
        raise ValueError(f"the stored run {keys[0]} is {state}: train it again, or name another")
    recipe = Recipe.from_dict(found[0]["recipe"])
    network = group.build(recipe)
    network.load_state_dict(found[1])
    return recipe, network.eval()


def export(name: str, path: Path, *, int8: bool = False, force: bool = False) -> str:
    """Write a trained network as an ONNX file, after a comparison with PyTorch; what was written.

    name: as for `find`. int8: its linear layers are quantised dynamically. force: replace a file.
    Raises ValueError for what is not to be written, OSError for what cannot.
    """
    # First, so that a missing package is known before anything is computed.
    for package in ("onnx", "onnxruntime", "onnxscript"):
        importlib.import_module(package)
    if not path.parent.is_dir():
        check.refuse("the folder", str(path.parent), "one that exists")
    if path.exists() and not force:
        check.refuse("the file", str(path), "a new name, or --force to replace it")
    recipe, network = find(name)
    # A sample of MNIST that is on every machine; other datasets by their own name.
    sample = "mnist-5k" if recipe.dataset == "mnist" else recipe.dataset
    images = data.load(sample, "cpu").test.images
    content = to_onnx(network, images.shape[1:])
    content = quantised(content) if int8 else content
    finding = compared(content, loop.predict(network, images), images, exact=not int8)
    files.put(path, content)
    kind = "int8" if int8 else "fp32"
    return f"{path}: {recipe.model}, {kind}, {len(content):,} bytes, uint8 images in; {finding}"


def compared(content: bytes, expected: Tensor, images: Tensor, *, exact: bool) -> str:
    """How a file's answers compare with PyTorch's logits, in words.

    Raises ValueError if they differ: by more than rounding (exact), or in too many digits.
    """
    given = logits(content, images)
    if exact:
        away = (given - expected).abs().max().item()
        if not away <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the file's logits differ from PyTorch's by {away:g}: not written")
        return f"logits within {away:.1g} of PyTorch's on {len(images):,} images"
    same = int((given.argmax(1) == expected.argmax(1)).sum())
    share = f"PyTorch's answer on {same:,} of {len(images):,} images"
    if same < LEAST_AGREEMENT * len(images):
        raise ValueError(f"the int8 file gives {share} only: not written; try without --int8")
    return share
