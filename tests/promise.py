"""The promise: what is on with some facts unknown stays on whatever they turn out to be, and errors are final."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Decided = Mapping[str, Any]


def assert_kept(fewer: Decided, more: Decided) -> None:
    """Compare one feature's decision with fewer facts known to that with more; both as the JSON form has them."""
    assert_final(fewer, more, f"feature {fewer['feature']}")
    if fewer["layers"] is not None and more["layers"] is not None and more["layers"]:
        assert [layer["index"] for layer in fewer["layers"]] == [layer["index"] for layer in more["layers"]]
        for before, after in zip(fewer["layers"], more["layers"], strict=True):
            assert_final(before, after, f"feature {fewer['feature']}, layer {before['index']}")


def assert_final(fewer: Decided, more: Decided, what: str) -> None:
    if fewer["state"] == "on":
        for key in ("state", "option", "outputs"):
            assert more[key] == fewer[key], f"{what} was on, now {key} is {more[key]!r}, not {fewer[key]!r}"
    if fewer["state"] == "error":
        assert more["state"] != "on", f"{what} was an error and is on"


def assert_facts_kept(fewer: Decided, more: Decided) -> None:
    """What a decision knew of another feature's decision stays so: `feature.*` facts are facts like any other."""
    for name, value in fewer["facts_used"].items():
        # A layer's come by ranges of layers, which differ where more layers are known.
        if name.startswith("feature.") and not isinstance(value, Mapping):
            after = more["facts_used"].get(name, value)
            assert after == value or isinstance(after, Mapping), f"`{name}` was {value!r}, now it is {after!r}"
