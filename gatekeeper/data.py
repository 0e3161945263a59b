"""Where the shipped rules and schemas are: the checkout's top-level folders, or the wheel's copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: Literal["rules", "schema"]) -> Path:
    """Return the folder of shipped rules or schemas.

    A wheel carries them as ``gatekeeper/_data/<name>``; a checkout has no such folder, and its top-level one is used.
    """
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
