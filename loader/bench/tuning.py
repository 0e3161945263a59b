"""Fill a table of configurations, one shape and number of tokens after the other; it can be stopped and goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from loader.bench import ours
from loader.bench.checks import Reference, References, accuracy
from loader.bench.problem import Model, Problem
from loader.bench.run import layers_of, problems_of
from loader.bench.shown import Shown
from loader.bench.timing import capture, in_turns
from loader.bench.tune import Best, search
from loader.bench.turn import Left
from loader.errors import TableError
from loader.kernels.configs import PACKED, Config, Shape, misfit
from loader.kernels.tuned import Measured, Table, file_name, table_at, to_change


def tune(
    models: Sequence[Model],
    tokens: Sequence[int],
    *,
    folder: Path,
    most: int,
    until: float | None,
    shown: Shown,
    again: bool = False,
    seed: int = 0,
    left: Left = nullcontext,
) -> bool:
    """Search for whatever of `models` and `tokens` the device's table in `folder` has not, and save after each find.

    With `again` for what it has, too, which stays unless something is faster beside it; another `seed` draws others.
    While something is compiled, others may have the device (`left`).
    False, and a line says so, where `until` passed before all of it was done.
    """
    device = torch.cuda.get_device_name()
    path = folder / file_name(device)
    find = partial(search, seed=seed, done=shown.tried, left=left)
    for model in models:
        table = table_at(path, device)
        missing = [count for count in tokens if again or not _is_complete(table, model, count)]
        if not missing:
            shown.say(f"{model.name} tp {model.tp_size} {model.format}: all of it is in {path}")
            continue
        _require_same_versions(table, path)
        layers = layers_of(model, "cuda", 0)
        for count in missing:
            table = table_at(path, device)
            if not again and _is_complete(table, model, count):
                shown.found()  # by another process, meanwhile
                continue
            if until is not None and time.monotonic() > until:
                more = "" if again else ", and the same command goes on from there"
                shown.say(f"the time is up; what was found is in {path}{more}")
                return False
            shown.point(_name(model, count))
            some = problems_of(model, layers, count, 0)
            shown.say(_tune_one(path, table, model, some, most, again, find))
            shown.found()
        del layers
        torch.cuda.empty_cache()
    return True


def _versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _require_same_versions(table: Table, path: Path) -> None:
    here = _versions()
    before = {name: table.versions[name] for name in here if name in table.versions}
    if table.configs and before != {name: here[name] for name in before}:
        raise TableError(
            f"`{path}` was measured with {_listed(before)}, here are {_listed(here)}; what one table has must be "
            "comparable: give another folder with --tables, which then counts in the place of this one"
        )


def _listed(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _is_complete(table: Table, model: Model, tokens: int) -> bool:
    found = [table.configs.get(shape, {}).get(tokens) for shape in model.stacks]
    compared = found[0] is not None and (not model.n_shared or found[0].apart_microseconds is not None)
    return compared and None not in found


def _name(model: Model, tokens: int) -> str:
    return f"{model.name} tp {model.tp_size} {model.format}, {tokens} tokens"


def _tune_one(
    path: Path,
    table: Table,
    model: Model,
    problems: Sequence[Problem],
    most: int,
    again: bool,
    find: Callable[..., Best],
) -> str:
    tokens = len(problems[0].x_TD)
    for shape, *some in zip(model.stacks, *(problem.parts() for problem in problems), strict=True):
        searched = tokens in table.configs.get(shape, {})
        if again or not searched:
            fewer = min(most, max(4, most // 3)) if searched else most
            start = [*_known(table, shape, tokens)[:most], *_beside(table, shape, tokens)]
            best = find(some, shape, most=fewer, start=start)
            found = Measured(tokens=tokens, microseconds=round(best.microseconds, 3), config=best.config)
            table = _save(path, shape, found)
    fused = table.configs[model.shape][tokens]
    if not model.n_shared:
        return f"{_name(model, tokens)}: {fused.microseconds:.1f} us"
    calls = {
        "fused": [ours.call(problem, fused.config) for problem in problems],
        "apart": [ours.apart_call(problem, table) for problem in problems],
    }
    right = References([Reference(problem) for problem in problems])
    for name, each in calls.items():
        right.require(each, accuracy(model.format), f"{_name(model, tokens)}, {name}")
    us = in_turns({name: capture(each) for name, each in calls.items()})
    together, apart = us["fused"].median, us["apart"].median
    _save(path, model.shape, replace(fused, microseconds=round(together, 3), apart_microseconds=round(apart, 3)))
    return f"{_name(model, tokens)}: {together:.1f} us, {apart:.1f} with the shared slots on their own"


def _known(table: Table, shape: Shape, tokens: int) -> list[Config]:
    """What won for as many tokens, once each, its own first, then other stacks', the most alike before others.

    Packed formats differ in what is unpacked, and hardly in which tiles are good.
    """
    alike = PACKED if shape.format in PACKED else {shape.format}

    def unlike(each: Shape) -> tuple[float, ...]:
        return *(abs(math.log(a / b)) for a, b in zip(_sizes(each), _sizes(shape), strict=True)), each != shape

    have = sorted(
        (each for each in table.configs if each.format in alike and tokens in table.configs[each]), key=unlike
    )
    won = (table.configs[each][tokens].config for each in have)
    return [config for config in dict.fromkeys(won) if not misfit(config, shape)]


def _sizes(shape: Shape) -> tuple[int, int, float]:
    """What decides about tiles, first what decides more: the sizes of an expert, then its share of the tokens."""
    return shape.width, shape.hidden_size, shape.top_k / shape.n_slots


def _beside(table: Table, shape: Shape, tokens: int) -> list[Config]:
    """What won for the next fewer and the next more tokens."""
    own = table.configs.get(shape, {})
    fewer, more = ([n for n in sorted(own) if n < tokens], [n for n in sorted(own) if n > tokens])
    return [own[n].config for n in (*fewer[-1:], *more[:1])]


def _save(path: Path, shape: Shape, measured: Measured) -> Table:
    with to_change(path, torch.cuda.get_device_name()) as table:
        _require_same_versions(table, path)
        table.versions = {**table.versions, **_versions()}
        table.configs.setdefault(shape, {})[measured.tokens] = measured
    return table
