"""Fill a table of configurations, one shape and number of tokens after the other; it can be stopped and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loader.bench import ours
from loader.bench.problem import Model, Problem
from loader.bench.run import layers_of, problems_of
from loader.bench.shown import Shown
from loader.bench.timing import capture, in_turns
from loader.bench.tune import search
from loader.errors import TableError
from loader.kernels.configs import KINDS, Config, Shape, misfit
from loader.kernels.tuned import Measured, Table, file_name, find_table


def tune(
    models: Sequence[Model],
    tokens: Sequence[int],
    *,
    folder: Path,
    most: int,
    until: float | None,
    shown: Shown,
) -> bool:
    """Search for whatever of `models` and `tokens` the device's table in `folder` has not, and save after each find.

    False, and a line says so, where `until` passed before all of it was there.
    """
    import triton

    device = torch.cuda.get_device_name()
    path = folder / file_name(device)
    table = find_table(device, folder) or Table(device=device, versions={})
    here = {"torch": torch.__version__, "triton": triton.__version__}
    for model in models:
        missing = [count for count in tokens if not _is_complete(table, model, count)]
        if not missing:
            shown.say(f"{model.name} tp {model.tp_size} {model.format}: all of it is in {path}")
            continue
        _require_same_versions(table, here, path)
        table.versions = {**table.versions, **here}
        layers = layers_of(model, "cuda", 0)
        for count in missing:
            if until is not None and time.monotonic() > until:
                shown.say(f"the time is up; what was found is in {path}, and the same command goes on from there")
                return False
            shown.point(_name(model, count))
            some = problems_of(model, layers, count, 0)
            shown.say(_tune_one(table, model, some, most, lambda: table.save(path), shown.tried))
            shown.found()
        del layers
        torch.cuda.empty_cache()
    return True


def _require_same_versions(table: Table, here: Mapping[str, str], path: Path) -> None:
    before = {name: table.versions[name] for name in here if name in table.versions}
    if table.configs and before != {name: here[name] for name in before}:
        raise TableError(
            f"`{path}` was measured with {_listed(before)}, here are {_listed(here)}; what one table has must be "
            "comparable: give another folder with --tables, which then counts in the place of this one"
        )


def _listed(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _shapes(model: Model) -> list[Shape]:
    """The stack as a whole, and where it has shared slots its two halves; plain shared ones are torch's products."""
    shape, n_shared = model.shape, model.n_shared
    shared = [] if KINDS[model.format] == "plain" else [shape.shared(n_shared)]
    return [shape, shape.routed(n_shared), *shared] if n_shared else [shape]


def _is_complete(table: Table, model: Model, tokens: int) -> bool:
    found = [table.configs.get(shape, {}).get(tokens) for shape in _shapes(model)]
    compared = found[0] is not None and (not model.n_shared or found[0].apart_microseconds is not None)
    return compared and None not in found


def _name(model: Model, tokens: int) -> str:
    return f"{model.name} tp {model.tp_size} {model.format}, {tokens} tokens"


def _tune_one(
    table: Table,
    model: Model,
    problems: Sequence[Problem],
    most: int,
    save: Callable[[], object],
    tried: Callable[[], None],
) -> str:
    shapes, tokens = _shapes(model), len(problems[0].x_TD)
    for shape, some in zip(shapes, _parts(model, problems), strict=True):
        if tokens not in table.configs.get(shape, {}):
            start = _of_others(table, shape, tokens)
            best = search(some, shape, most=max(4, most // 3) if start else most, start=start, done=tried)
            _note(table, shape, Measured(tokens=tokens, microseconds=round(best.microseconds, 3), config=best.config))
            save()
    fused = table.configs[model.shape][tokens]
    if not model.n_shared:
        return f"{_name(model, tokens)}: {fused.microseconds:.1f} us"
    us = in_turns(
        {
            "fused": capture([ours.call(problem, fused.config) for problem in problems]),
            "apart": capture([ours.apart_call(problem, table) for problem in problems]),
        }
    )
    together, apart = us["fused"], us["apart"]
    _note(table, model.shape, replace(fused, microseconds=round(together, 3), apart_microseconds=round(apart, 3)))
    save()
    return f"{_name(model, tokens)}: {together:.1f} us, {apart:.1f} with the shared slots on their own"


def _of_others(table: Table, shape: Shape, tokens: int) -> list[Config]:
    """What won for other stacks of this format with as many tokens, once each: a shorter search can start there."""
    found = (
        measured[tokens].config
        for other, measured in table.configs.items()
        if other.format == shape.format and tokens in measured and not misfit(measured[tokens].config, shape)
    )
    return list(dict.fromkeys(found))


def _note(table: Table, shape: Shape, measured: Measured) -> None:
    table.configs.setdefault(shape, {})[measured.tokens] = measured


def _parts(model: Model, problems: Sequence[Problem]) -> list[list[Problem]]:
    """The calls of each of `_shapes`."""
    if not model.n_shared:
        return [list(problems)]
    routed, shared = zip(*(problem.halves() for problem in problems), strict=True)
    return [list(problems), list(routed), list(shared)][: len(_shapes(model))]
