"""Every access of an interpreted kernel lies within one of its tensors: what `compute-sanitizer` says of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from triton.runtime import interpreter


@contextmanager
def within_tensors() -> Iterator[None]:
    """While it lasts, a load or store beyond the tensors of its launch raises `AssertionError`, unless it is masked."""
    spans: dict[str, tuple[int, int]] = {}
    take, load, store = (
        interpreter.GridExecutor._init_args_hst,
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.InterpreterBuilder.create_masked_store,
    )

    def noted(self: Any, arguments: Any, keywords: Any) -> Any:
        taken, named = take(self, arguments, keywords)
        spans.clear()
        given = {**dict(zip(self.arg_names, taken, strict=False)), **named}
        spans.update({name: _span(each) for name, each in given.items() if isinstance(each, Tensor)})
        return taken, named

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        _require_within(spans, pointers, mask, "load")
        return load(self, pointers, mask, *others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        _require_within(spans, pointers, mask, "store")
        return store(self, pointers, value, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", noted)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
        yield


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of its first byte, and of the one behind its last."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _require_within(spans: dict[str, tuple[int, int]], pointers: Any, mask: Any, what: str) -> None:
    asked = pointers.data[mask.data.astype(bool)]  # which may be integers, and are no indices
    if not asked.size:
        return
    first = int(asked.min())
    end = int(asked.max()) + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    if not any(begin <= first and end <= behind for begin, behind in spans.values()):
        each = (
            f"{name} {first - begin} to {end - begin} of {behind - begin}" for name, (begin, behind) in spans.items()
        )
        raise AssertionError(f"a {what} is within no tensor of its launch; bytes of each: {', '.join(each)}")
