"""Unquantized weights in half precision; as ``bf16`` in all but the dtype."""

from __future__ import annotations

from loader.formats.bf16 import Dense

FORMAT = Dense("fp16")
