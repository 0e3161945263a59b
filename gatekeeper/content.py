"""The digest of a rule set: over what its files say, not over how they are laid out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gatekeeper.source import Document, WrittenFloat


def content_digest(kinds: Mapping[str, list[Document]]) -> str:
    """Return the SHA-256 of what the documents say; how they are laid out or commented does not count."""
    content = [
        # Amendments work in the order of their overlays; of all else the order of files says nothing.
        [kind, position if kind in ("amendment", "overlay") else 0, document.data]
        for kind, documents in sorted(kinds.items())
        for position, document in enumerate(documents)
    ]
    texts = sorted(json.dumps(_canonical(one), sort_keys=True, ensure_ascii=False) for one in content)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Return content as the digest sees it: a number that a version may be read from counts as written."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return {"number": value.text} if isinstance(value, WrittenFloat) else value
