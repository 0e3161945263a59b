"""Fill a table of configurations, one shape and number of tokens after the other; it can be stopped and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loader.bench import ours
from loader.bench.problem import Model, Problem
from loader.bench.run import layers_of, problems_of
from loader.bench.timing import microseconds
from loader.bench.tune import search
from loader.kernels.configs import Config, Shape
from loader.kernels.triton_backend import dense_shape, routed_shape
from loader.kernels.tuned import Measured, Table, file_name, find_table


def tune(
    models: Sequence[Model],
    tokens: Sequence[int],
    *,
    folder: Path,
    most: int,
    until: float | None,
    say: Callable[[str], object],
) -> bool:
    """Search for whatever of `models` and `tokens` the device's table in `folder` has not; False if `until` passed.

    The table is saved after each find.
    """
    import triton

    device = torch.cuda.get_device_name()
    path = folder / file_name(device)
    table = find_table(device, folder) or Table(device=device, versions={})
    table.versions = {**table.versions, "torch": torch.__version__, "triton": triton.__version__}
    for model in models:
        missing = [count for count in tokens if not _is_complete(table, model, count)]
        if not missing:
            say(f"{model.name} tp {model.tp_size} {model.format}: all of it is in {path}")
            continue
        layers = layers_of(model, "cuda", 0)
        for count in missing:
            if until is not None and time.monotonic() > until:
                return False
            say(_tune_one(table, model, problems_of(model, layers, count, 0), most))
            table.save(path)
        del layers
        torch.cuda.empty_cache()
    return True


def _shapes(model: Model) -> list[Shape]:
    """The stack as a whole, and where it has shared slots its two halves."""
    shape, n_shared = model.shape, model.n_shared
    if not n_shared:
        return [shape]
    return [shape, routed_shape(replace(shape, top_k=model.top_k), n_shared), dense_shape(shape, n_shared)]


def _is_complete(table: Table, model: Model, tokens: int) -> bool:
    return all(tokens in table.configs.get(shape, {}) for shape in _shapes(model))


def _tune_one(table: Table, model: Model, problems: Sequence[Problem], most: int) -> str:
    tokens = len(problems[0].x_TD)
    found: list[Config] = []
    took: list[float] = []
    for shape, some in zip(_shapes(model), _parts(model, problems), strict=True):
        best = search(some, shape, most=most if not found else max(4, most // 3), start=found[:1])
        found.append(best.config)
        took.append(best.microseconds)
        _note(table, shape, Measured(tokens=tokens, microseconds=round(best.microseconds, 3), config=best.config))
    text = f"{model.name} tp {model.tp_size} {model.format}, {tokens} tokens: {took[0]:.1f} us"
    if len(found) == 1:
        return text
    apart = microseconds([ours.split_call(problem, found[1], found[2]) for problem in problems])
    fused = table.configs[model.shape][tokens]
    _note(table, model.shape, replace(fused, apart_microseconds=round(apart, 3)))
    return f"{text}, {apart:.1f} with the shared slots on their own"


def _note(table: Table, shape: Shape, measured: Measured) -> None:
    table.configs.setdefault(shape, {})[measured.tokens] = measured


def _parts(model: Model, problems: Sequence[Problem]) -> list[list[Problem]]:
    """The calls of each of `_shapes`."""
    k = model.top_k
    if not model.n_shared:
        return [list(problems)]
    routed, shared = (
        [
            replace(
                problem,
                topk_weights_TK=problem.topk_weights_TK[:, columns].contiguous(),
                topk_ids_TK=problem.topk_ids_TK[:, columns].contiguous(),
            )
            for problem in problems
        ]
        for columns in (slice(k), slice(k, None))
    )
    return [list(problems), routed, shared]
