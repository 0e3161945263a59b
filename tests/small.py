"""A small rule set as texts, and short ways to load it, to see its faults and to decide with it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from structlog.testing import capture_logs

from gatekeeper import Decision, RuleError, RuleSet, decide, from_record, parse_rule_set

MANIFEST = "name: small\nversion: 1\nlanguage: 1\n"
FACTS = """\
facts:
  model.runner: {type: enum, values: [target, draft], doc: The runner., given_by: [caller]}
  model.family: {type: string, doc: A family., from: [family], given_by: [config]}
  model.n: {type: integer, minimum: 1, doc: A number., from: [n], given_by: [config]}
  model.m: {type: integer, default: 7, doc: Another number., from: [m], given_by: [config]}
  model.rate: {type: number, doc: A rate., given_by: [config]}
  model.tags: {type: list, items: string, doc: Some tags., given_by: [config]}
  model.sizes: {type: list, items: integer, doc: Some sizes., given_by: [config]}
  model.double: {type: integer, derive: model.n * 2, doc: Twice the number.}
  quant.method: {type: string, default: none, doc: The method., given_by: [config]}
  quant.ignored: {type: list, items: string, doc: The exclude list., given_by: [config]}
  layer.index: {type: integer, doc: Its number., given_by: [headers]}
  layer.name: {type: string, doc: Its name., given_by: [headers]}
  layer.role: {type: enum, values: [main, mtp], doc: Its role., given_by: [headers]}
  layer.size: {type: integer, doc: Its size., given_by: [headers]}
  layer.big: {type: boolean, derive: layer.size > model.n, doc: Whether it is big.}
  layer.one:
    type: record
    doc: A storage.
    given_by: [headers]
    fields: {format: {type: string, doc: Its format.}, width: {type: integer, doc: Its width.}}
  layer.two:
    type: record
    doc: Another storage.
    given_by: [headers]
    fields: {format: {type: string, doc: Its format.}, width: {type: integer, doc: Its width.}}
  layer.alike: {type: boolean, derive: layer.one == layer.two, doc: Whether both are stored alike.}
  layer.there: {type: boolean, derive: present(layer.two), doc: Whether there is a second one.}
  platform.arch: {type: arch, doc: The architecture., given_by: [platform, flags]}
  parallel.tp_size: {type: integer, controllable: [1, 2, 4], doc: Ranks., given_by: [flags]}
  server.force: {type: boolean, default: false, doc: Force it., given_by: [flags]}
  server.forbid: {type: boolean, default: false, doc: Forbid it., given_by: [flags]}
  server.backend: {type: string, default: auto, doc: The backend asked for., given_by: [flags]}
  server.extra: {type: string, doc: A flag without a default., given_by: [flags]}
  server.none: {type: string, null_means: absent, doc: A flag whose null means absent., given_by: [flags]}
  engine.backend: {type: string, doc: The backend in use., given_by: [engine]}
  engine.name: {type: string, doc: The engine., given_by: [engine]}
  library.torch: {type: version, doc: The version of torch., given_by: [library]}
"""
FEATURE = """\
feature: fused
summary: One thing instead of two.
requires:
  - {id: enough, protects: support, that: {model.n: {ge: 4}}, reason: "There are {model.n}, not 4."}
"""
FILES: Mapping[str, str] = {"ruleset.yaml": MANIFEST, "facts/all.yaml": FACTS, "features/fused.yaml": FEATURE}


def files(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The small rule set with other texts in the place of some; None leaves a file out."""
    merged = {**FILES, **{name: text and textwrap.dedent(text) for name, text in (changes or {}).items()}}
    return {name: text for name, text in merged.items() if text is not None}


def faults(changes: Mapping[str, str | None]) -> list[str]:
    """What is wrong: `file:line:column: code: message` of each fault; empty where nothing is."""
    try:
        parse_rule_set(files(changes))
    except RuleError as error:
        return [str(fault) for fault in error.faults]
    return []


@lru_cache(maxsize=256)
def _rules(feature: str) -> RuleSet:
    return parse_rule_set(files({"features/fused.yaml": feature}))


def rules(feature: str = FEATURE) -> RuleSet:
    """The small rule set with this feature."""
    return _rules(textwrap.dedent(feature))


def decision(feature: str = FEATURE, /, **record: Any) -> Decision:
    """The decision on a line of facts: `decision(FEATURE, facts={"model.n": 4})`."""
    return decide_with(rules(feature), record)


def decide_with(small: RuleSet, record: Mapping[str, Any], feature: str = "fused") -> Decision:
    """The decision of a rule set on a line of facts, as JSON brings it."""
    with capture_logs():
        return decide(small, from_record(small.catalogue, json.loads(json.dumps(record))), [feature])[feature]


def truth(condition: str, facts: Mapping[str, Any], **record: Any) -> str:
    """What a condition comes to, by the state of a requirement that has it: passed, failed or unknown."""
    feature = f"""\
feature: fused
summary: One thing instead of two.
scope: {record.pop("scope", "model")}
requires:
  - {{id: asked, protects: support, that: {condition}, reason: It does not hold.}}
"""
    found = decision(feature, facts=facts, **record)
    return found.outcomes[0].state
