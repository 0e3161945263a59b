"""Unquantized weights in single precision; a narrower compute dtype rounds each of gate, up and down."""

from __future__ import annotations

from loader.formats.base import SCALED_ROUNDINGS
from loader.formats.bf16 import Dense

FORMAT = Dense("fp32", roundings=SCALED_ROUNDINGS)
