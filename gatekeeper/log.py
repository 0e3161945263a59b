"""One structlog event a decision, `gate.decided`; the application configures structlog, we do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gatekeeper.decision import Decision

_muted: ContextVar[bool] = ContextVar("muted", default=False)

MAX_ITEMS = 20
"""A longer list in an event is given as its count and digest."""


def decided(decision: Decision) -> None:
    """Log a decision: info when automatic, warning when something was waived or is degraded, error when refused."""
    if _muted.get():
        return
    import structlog  # with rich and asyncio the longest import of all; only who decides pays for it

    log = structlog.get_logger("gatekeeper")
    waived = decision.outcome_ids("waived")
    layers = decision.layers or ()
    degraded = decision.degraded or next((layer.degraded for layer in layers if layer.degraded), "")
    level = log.info
    if decision.in_force.state == "error":
        level = log.error
    elif waived or degraded or decision.request_ignored or decision.warnings:
        level = log.warning
    told = {"mode": decision.mode} if decision.mode == "shadow" else {}
    if decision.warnings:
        told["warnings"] = _short(list(decision.warnings))
    level(
        "gate.decided",
        feature=decision.feature,
        gate=decision.gate,
        runner=decision.runner,
        state=decision.state,
        option=decision.option,
        decided_by=decision.decided_by,
        reason=decision.reason,
        failed=_short(decision.outcome_ids("failed")),
        waived=_short(waived),
        facts={name: _short(value) for name, value in decision.facts_used.items()},
        digest=decision.digest,
        rule_set=f"{decision.rule_set['name']} {decision.rule_set['version']}",
        **told,
    )


def _short(value: Any) -> Any:
    if isinstance(value, list | dict) and len(value) > MAX_ITEMS:
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return {"count": len(value), "sha256": digest}
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value


def feature_flag_attributes(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add OpenTelemetry's feature-flag attributes to a `gate.decided` event; a structlog processor.

    Names from https://opentelemetry.io/docs/specs/semconv/feature-flags/feature-flags-events/.
    """
    if event.get("event") == "gate.decided":
        event["feature_flag.key"] = event["feature"]
        event["feature_flag.result.variant"] = event["option"] or event["state"]
        event["feature_flag.result.reason"] = event["decided_by"] or "default"
        event["feature_flag.provider.name"] = "model-gatekeeper"
        event["feature_flag.set.id"] = event["rule_set"]
        event["feature_flag.version"] = event["digest"]
    return event


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the events of decisions that nobody acts on, such as those of a table's rows."""
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)
