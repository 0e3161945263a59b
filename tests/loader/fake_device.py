"""A device that isn't there: tensors that say they are on `meta`, compute on the CPU, and count what a GPU would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
WAITS = frozenset({"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"})
"""What must wait for the device, as its answer or the answer's size comes from there."""


class OnDevice(Tensor):
    """A tensor of the device, which has it in the CPU's memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE, storage_offset=0
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """As on a device: by way of the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Outside of `counted` nothing is counted."""
        return _call(func, args, kwargs or {}, Counter())


class _Mode(TorchDispatchMode):
    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {}, self.calls)


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], calls: Counter[str]) -> Any:
    seen: list[OnDevice] = []

    def inner(each: Any) -> Any:
        if isinstance(each, OnDevice):
            seen.append(each)
            return each.inner
        return each

    name = func.overloadpacket.__name__
    arguments, options = tree_map(inner, args), dict(tree_map(inner, kwargs))
    target = options.get("device")
    asks = target is not None and torch.device(target) == DEVICE
    if asks:
        options["device"] = "cpu"
    found = func(*arguments, **options)
    leaves = bool(seen) and name == "_to_copy" and target is not None and not asks
    if not seen and not asks:
        return found
    if name == "_to_copy" and (leaves or not seen):
        calls["to the host" if leaves else "to the device"] += 1
        return found if leaves else OnDevice(found)
    if name in WAITS:
        calls["waits"] += 1
    if not func.is_view:
        calls["calls"] += 1
    if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], OnDevice):
        return args[0]
    return tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, found)


def put(module: nn.Module) -> None:
    """Say of all parameters that they are on the device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(OnDevice(parameter.detach()), requires_grad=False))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """``calls`` that compute on the device, ``to the host`` and ``to the device``, and ``waits`` beside those."""
    calls: Counter[str] = Counter()
    with _Mode(calls):
        yield calls


def synchronisations(calls: Mapping[str, int]) -> int:
    """How often the host waited for the device."""
    return calls.get("to the host", 0) + calls.get("to the device", 0) + calls.get("waits", 0)
