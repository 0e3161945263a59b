"""What the operator asked of a feature, as far as it is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gatekeeper.rules import Request
from gatekeeper.values import ABSENT, Values


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator asked for, as far as it is known."""

    word: str
    """`auto on off both unknown` or an option's name, for the decision."""
    forced: bool = False
    forbidden: bool = False
    option: str | None = None
    unknown: bool = False
    """Some answer is still open: it may come to be forced or forbidden."""
    may_force: bool = False
    may_forbid: bool = False

    def ignored(self) -> Asked:
        """The same under a gate that ignores requests: a force counts for nothing, forbidding always counts."""
        return replace(self, forced=False, may_force=False, option=None, unknown=self.may_forbid)


def read_request(request: Request, values: Values) -> Asked:
    """Read what was asked from the facts of the whole model; an unknown flag counts as not set, and is remembered."""
    if request.fact:
        return _by_word(values.get(request.fact))
    force = values.get(request.force) if request.force else False
    return _by_flags(force, values.get(request.forbid) if request.forbid else False)


@lru_cache(maxsize=16)
def _by_flags(force: Any, forbid: Any) -> Asked:
    may_force, may_forbid = force is None, forbid is None
    forced, forbidden = force is True, forbid is True
    if forced and forbidden:
        word = "both"
    elif may_force or may_forbid:
        word = "off" if forbidden else "on" if forced and not may_forbid else "unknown"
    else:
        word = "on" if forced else "off" if forbidden else "auto"
    return Asked(word, forced, forbidden, None, may_force or may_forbid, may_force, may_forbid)


@lru_cache(maxsize=256)
def _by_word(value: Any) -> Asked:
    if value is None:
        return Asked("unknown", unknown=True, may_force=True, may_forbid=True)
    word = "auto" if value is ABSENT else str(value)
    if word in ("auto", "on", "off"):
        return Asked(word, forced=word == "on", forbidden=word == "off")
    return Asked(word, forced=True, option=word)
