"""Number formats: which of them a device computes in, and PyTorch's settings for them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

PRECISIONS = ("fp32", "bf16", "tf32", "fp64")


def effective(precision: str, device: torch.device) -> str:
    """The precision that is used: bf16 on a processor that is slow at it is fp32."""
    if precision == "bf16" and device.type == "cpu":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where it is safe, while the weights stay float32; nothing at other precisions."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def settings(precision: str, device: torch.device) -> Iterator[None]:
    """PyTorch's settings and generators for one training; afterwards they are as before."""
    tf32 = precision == "tf32"
    _check_tf32_can_be_switched()
    matmul = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    with (
        changed(*matmul, "high" if tf32 else "highest"),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        # This context manager switches cuDNN off unless it is told enabled=True.
        torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32, deterministic=True),
    ):
        yield


def _check_tf32_can_be_switched() -> None:
    try:
        torch.get_float32_matmul_precision()
        _ = torch.backends.cudnn.allow_tf32
    except RuntimeError as error:
        # PyTorch has older and newer switches, and refuses the older once a newer one is set.
        raise RuntimeError(
            "TF32 is set by an fp32_precision attribute of torch.backends, which kdlib cannot put "
            'back after a training: call torch.set_float32_matmul_precision("highest") and set '
            'torch.backends.cudnn.allow_tf32 = True before; trainings take precision="tf32"'
        ) from error


def default_dtype(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """PyTorch's default dtype, whatever a notebook has set, restored afterwards."""
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


@contextlib.contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """One of the process's settings at another value; afterwards it is as before."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)
