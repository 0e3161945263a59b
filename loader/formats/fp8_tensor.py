"""FP8 with one scale to the matrix; as ``fp8_channel``, whose one column of scales is a single number here."""

from __future__ import annotations

from loader.formats.fp8_channel import FP8Rows

FORMAT = FP8Rows("fp8_tensor")
