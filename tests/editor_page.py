"""The settings that docs/editors.md tells people to use, read from the page itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "editors.md"


def vscode_settings() -> dict[str, dict[str, str]]:
    """The content of .vscode/settings.json."""
    settings: dict[str, dict[str, str]] = json.loads(_block("json"))
    return settings


def neovim_schemas() -> dict[str, str]:
    """`settings.yaml.schemas` of the Lua configuration."""
    return dict(re.findall(r"\['([^']+)'\] = '([^']+)',", _block("lua")))


def modeline() -> str:
    """The line that names a schema in the file itself."""
    return _block("yaml").strip()


def _block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)
