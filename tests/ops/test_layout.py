"""Layouts at the front doors of the ops."""

import pytest
import torch

from perilune.ops import SequenceLayout, as_layout


def test_a_layout_follows_the_tokens_to_their_device():
    layout = SequenceLayout.from_lengths([2, 0, 3])
    assert as_layout(layout, torch.zeros(5, 4)) is layout
    for given in (layout, layout.cu_seqlens, layout.cu_seqlens.long()):
        moved = as_layout(given, torch.zeros(5, 4, device="meta"))
        assert moved.lengths == layout.lengths
        assert moved.cu_seqlens.device.type == "meta"


@pytest.mark.parametrize("given", [SequenceLayout.from_lengths([2, 2]), torch.tensor([0, 2, 4])])
def test_a_layout_of_other_tokens_is_refused(given):
    with pytest.raises(ValueError, match="must end with the number of tokens 5, got 4"):
        as_layout(given, torch.zeros(5))
