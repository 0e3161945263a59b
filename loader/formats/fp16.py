"""Unquantized weights in half precision; as ``bf16`` in all but the dtype."""

from __future__ import annotations

import torch

from loader.formats.base import Part
from loader.formats.bf16 import Dense

FORMAT = Dense("fp16", (Part(suffix="weight", dtype=torch.float16),))
