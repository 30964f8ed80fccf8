"""A run's curves as TensorBoard scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DECIDES_NOTHING = "it writes what has been trained"


def writer() -> Any:
    """TensorBoard's writer. Raises ModuleNotFoundError, with what to install."""
    # No dependency of kdlib's: only those who read these curves in it need it.
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"log_dir needs TensorBoard ({error}): pip install tensorboard", name="tensorboard"
        ) from error
    return SummaryWriter


def log(runs: Sequence[Any], folder: Path) -> None:
    """Write each run into a folder of its own, each curve under its own tag at its true steps."""
    for run in runs:
        with writer()(str(folder / f"{run.recipe.model}-{run.recipe.key}")) as scalars:
            for name, values in run.curves.items():
                for step, value in zip(run.curves["step"], values, strict=True):
                    if name != "step":
                        scalars.add_scalar(name.replace("_", "/", 1), value, step)
