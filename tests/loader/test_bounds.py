"""The check of bounds sees an access that is out of them (see suites.yaml)."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("tensor", ["source", "out"])
@pytest.mark.parametrize("count", [8, 9])
def test_an_access_beyond_a_tensor_is_an_error(tensor: str, count: int) -> None:
    from tests.loader.copying import copy

    sizes = {"source": 16, "out": 16, tensor: 8}
    source, out = (torch.arange(sizes[name], dtype=torch.float32) for name in ("source", "out"))
    if count == 8:
        copy[1,](source, out, count, SIZE=16)
        return
    with pytest.raises(Exception, match=f"a {'load' if tensor == 'source' else 'store'} is within no tensor"):
        copy[1,](source, out, count, SIZE=16)


def test_a_view_is_held_to_its_own_rows() -> None:
    from tests.loader.copying import copy

    whole = torch.arange(32.0)
    copy[1,](whole[8:16], torch.empty(8), 8, SIZE=16)
    with pytest.raises(Exception, match="source 0 to 36 of 32"):
        copy[1,](whole[8:16], torch.empty(16), 9, SIZE=16)
