"""A gate's requirements to Python functions: their truths, what they make of the gate, and their reasons."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from gatekeeper import syntax as to
from gatekeeper.compile import Code
from gatekeeper.conditions import ALWAYS, TEMPLATE, All, Any_, Condition, Not, facts_of
from gatekeeper.syntax import FALSE, NONE, TRUE, Expr
from gatekeeper.values import Values

if TYPE_CHECKING:
    from gatekeeper.catalogue import Catalogue
    from gatekeeper.rules import Requirement

Tell: TypeAlias = Callable[["Requirement", Values], str]


def compile_truths(demands: Sequence[Requirement], catalogue: Catalogue) -> Callable[[Values], list[Any]]:
    """Return a function from values to, for each requirement, the truths of its `when` and of the requirement."""
    code = Code(catalogue)
    pairs: list[Expr] = [to.tuple_(code.truth(one.when), code.truth(formula(one))) for one in demands]
    return code.function("values", result=to.list_(pairs))  # type: ignore[no-any-return]


def compile_requires(demands: Sequence[Requirement], catalogue: Catalogue) -> Callable[[Values, bool], str | None]:
    """Return a function from values, and whether the feature is forced, to what a gate's requirements make of it.

    None: they all hold. Else lines 3 to 5 of the design's states: `error`, `off`, `pending`; and where every failed
    one says `on_failure: error` and none is unknown, `failed`, or `waivable` if a request would waive them all.
    """
    code = Code(catalogue)
    code.body += [to.set_("unknown", FALSE), to.set_("failed", NONE)]
    for one in sorted(demands, key=lambda one: one.waivable):
        truth = code.kept(code.truth(formula(one)))
        judge = to.if_(to.not_(truth), [to.if_(to.is_(to.own(truth), NONE), [to.set_("unknown", TRUE)], _failure(one))])
        code.body.append(to.if_(to.not_(to.name("forced")), [judge]) if one.waivable else judge)
    code.body.append(to.if_(to.name("unknown"), [to.return_(to.constant("pending"))]))
    return code.function("values", "forced", result=to.name("failed"))  # type: ignore[no-any-return]


def _failure(one: Requirement) -> list[ast.stmt]:
    if one.on_failure == "error" and one.waivable:
        return [to.set_("failed", to.or_(to.name("failed"), to.constant("waivable")))]
    if one.on_failure == "error":
        error = to.if_(to.name("forced"), [to.return_(to.constant("error"))])
        return [error, to.set_("failed", to.constant("failed"))]
    if one.waivable:  # judged only where it isn't forced
        return [to.return_(to.constant("off"))]
    return [to.return_(to.either(to.name("forced"), to.constant("error"), to.constant("off")))]


def compile_reasons(demands: Sequence[tuple[Requirement, str | None]], tell: Tell, catalogue: Catalogue) -> Any:
    """Return a function that lists (id, state, reason, values) of requirements, each given with its option.

    It takes the values, whether the feature is forced, and the option asked for by name. `tell` gives a reason that
    is more than facts in a text.
    """
    code = Code(catalogue)
    found = []
    for one, option in demands:
        asked = to.compare(ast.Eq, to.name("asked"), to.constant(option))
        found.append(_finding(code, one, to.name("forced") if option is None else asked, tell))
    return code.function("values", "forced", "asked", result=to.list_(found))


def formula(one: Requirement) -> Condition:
    """Return a requirement as one condition: `not when or that`."""
    return one.that if one.when == ALWAYS else Any_((Not(one.when), one.that))


def _finding(code: Code, one: Requirement, waives: Expr, tell: Tell) -> Expr:
    """Return what a requirement came to: a constant where it passed, else with its reason and values."""
    when = code.kept(code.truth(one.when))
    holds = code.kept(code.truth(formula(one)))
    state: Expr = to.either(to.is_(to.own(holds), FALSE), to.constant("failed"), to.constant("unknown"))
    if one.waivable:
        state = to.either(waives, to.constant("waived"), state)
    specs = [code.catalogue[name] for name in sorted(facts_of(All((one.when, one.that))))]
    names = [name for spec in specs for name in ([f"{spec.name}.{key}" for key in spec.fields] or [spec.name])]
    values = to.dict_([to.constant(name) for name in names], [code.fact(name) for name in names])
    told = to.tuple_(to.constant(one.id), state, _text(code, one, tell), values)
    result = to.either(holds, to.constant((one.id, "passed", "", None)), told)
    if one.when == ALWAYS:
        return result
    idle = to.constant((one.id, "not_applicable", "", None))
    return to.either(to.is_(when, FALSE), idle, result)


def _text(code: Code, one: Requirement, tell: Tell) -> Expr:
    parts: list[Expr] = []
    end = 0
    for found in TEMPLATE.finditer(one.reason):
        parts.append(to.constant(one.reason[end : found.start()]))
        end = found.end()
        if found[1] is None:
            parts.append(to.constant(found[0][0]))
        elif found[1] not in code.catalogue or code.catalogue[found[1]].fields:
            return to.call(code.bound(tell), code.bound(one), to.name("values"))
        else:
            parts.append(to.call(to.name("show"), code.fact(found[1])))
    return to.text([*parts, to.constant(one.reason[end:])])
