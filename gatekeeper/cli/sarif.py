"""Faults as a SARIF 2.1.0 log (https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html)."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gatekeeper.diagnostics import Diagnostic, diagnostics
from gatekeeper.errors import Fault, Where

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif_log(faults: Sequence[Fault]) -> dict[str, Any]:
    """Return the log of one run; its rules are all codes that there are."""
    codes = list(diagnostics())
    seen: Counter[str] = Counter()
    results = [_result(fault, codes.index(fault.code), seen) for fault in faults]
    driver = {
        "name": "gatekeeper",
        "version": version("model-gatekeeper"),
        "rules": [_rule(one) for one in diagnostics().values()],
    }
    # Our columns count characters, where SARIF's own habit is to count UTF-16 units.
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(one: Diagnostic) -> dict[str, Any]:
    return {
        "id": one.code,
        "shortDescription": {"text": one.title},
        "fullDescription": {"text": f"{one.means} {one.because}"},
        "help": {"text": f"{one.means}\n{one.because}\nExamples: gatekeeper help {one.code}"},
        "defaultConfiguration": {"level": one.severity},
    }


def _result(fault: Fault, index: int, seen: Counter[str]) -> dict[str, Any]:
    # The text of the line, not its number: a fault stays the same one when lines above it come or go.
    same = f"{fault.code}\0{fault.where.file}\0{fault.where.source.strip()}\0{fault.message}"
    seen[same] += 1
    # A path may hold bytes that are no text.
    digest = hashlib.sha256(f"{same}\0{seen[same]}".encode(errors="surrogateescape")).hexdigest()
    return {
        "ruleId": fault.code,
        "ruleIndex": index,
        "level": fault.severity,
        "message": {"text": fault.message},
        "locations": [{"physicalLocation": _location(fault.where)}],
        "partialFingerprints": {"codeAndLine/v1": digest},
    }


def _location(where: Where) -> dict[str, Any]:
    path = Path(where.file)
    uri = path.as_uri() if path.is_absolute() else quote(os.fsencode(path.as_posix()))
    location: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if where.line:
        region: dict[str, Any] = {"startLine": where.line}
        if where.column:
            region["startColumn"] = where.column
        if where.source:
            region["snippet"] = {"text": where.source}
        location["region"] = region
    return location
