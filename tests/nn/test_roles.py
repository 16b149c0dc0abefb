"""Logical matrices and the row addresses of QK-Clip."""

import pytest
import torch
from torch import nn

from perilune.nn import MatrixLayout, QKClipSpec
from perilune.ops.layout import SequenceLayout
from tests.nn.helpers import make_mixer, packed_input


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("split", ["component", "head", "none"])
@pytest.mark.parametrize(
    "layout",
    [
        MatrixLayout(row_groups=(2, 3), num_periods=4),
        MatrixLayout(row_groups=(2, 3)),
        MatrixLayout(row_groups=(5,)),
        MatrixLayout(row_groups=(4, 4), is_fused=True),
    ],
)
def test_merge_undoes_split(layout, split, stack):
    tensor = torch.randn(*stack, layout.num_rows, 6, generator=torch.Generator().manual_seed(0))
    parts = layout.split(tensor, split)
    assert sum(part.numel() for part in parts) == tensor.numel()
    assert torch.equal(layout.merge(parts, split), tensor)


def test_components_gather_the_rows_of_all_heads():
    layout = MatrixLayout(row_groups=(2, 1), num_periods=2)
    tensor = torch.arange(6.0)[:, None]
    nope, rope = layout.split(tensor, "component")
    assert nope.flatten().tolist() == [0, 1, 3, 4]
    assert rope.flatten().tolist() == [2, 5]
    (heads,) = layout.split(tensor, "head")
    assert heads[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert layout.split(tensor, "none")[0] is tensor


def test_fused_matrices_are_always_separated():
    layout = MatrixLayout(row_groups=(3, 3), is_fused=True)
    for split in ("component", "head", "none"):
        assert len(layout.split(torch.zeros(2, 6, 4), split)) == 2


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="row_groups"):
        MatrixLayout(row_groups=())
    with pytest.raises(ValueError, match="num_periods"):
        MatrixLayout(row_groups=(2,), num_periods=0)
    layout = MatrixLayout(row_groups=(2, 1), num_periods=2)
    with pytest.raises(ValueError, match=r"must be \[6, C\]"):
        layout.split(torch.zeros(5, 2), "component")
    with pytest.raises(ValueError, match="split must be one of"):
        layout.split(torch.zeros(6, 2), "rows")


def scale_rows(spec: QKClipSpec, gamma: torch.Tensor, alpha: float) -> None:
    """QK-Clip of Kimi K2, algorithm 1, with the released layout's row addresses."""
    with torch.no_grad():
        query = spec.query.view(spec.num_heads, spec.query_rows, -1)
        key = spec.key.view(spec.num_kv_heads, spec.key_rows, -1)
        query[:, : spec.nope_dim] *= gamma[:, None, None] ** alpha
        query[:, spec.nope_dim :] *= gamma[:, None, None]
        key[:, : spec.nope_dim] *= gamma[:, None, None] ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        "mla",
        "mla-rope",
        "mla-yarn",
        "mla-low-rank-query",
        "mla-no-shared-key",
        "gqa-mha",
        "moba-mha",
        "moba-wide-key-conv",
    ],
)
def test_scaling_the_addressed_rows_brings_the_maximum_to_tau(name, alpha):
    mixer = make_mixer(name)
    spec = mixer.qk_clip_spec()
    x, layout = packed_input((7, 4))
    mixer(x, layout)
    before = spec.max_logits().clone()
    tau = float(before.sort().values[1]) * 0.9
    assert (before > tau).any()
    spec.reset()
    gamma = torch.where(before > tau, tau / before, torch.ones_like(before))
    scale_rows(spec, gamma, alpha)
    mixer(x, layout)
    # maxima are recorded in float32
    torch.testing.assert_close(spec.max_logits(), before.clamp(max=tau), rtol=1e-6, atol=1e-6)


def test_values_are_not_among_the_scaled_rows():
    mixer = make_mixer("mla")
    spec = mixer.qk_clip_spec()
    x, layout = packed_input((1,))
    before = mixer(x, layout)
    scale_rows(spec, torch.full((3,), 0.5, dtype=torch.float64), 0.5)
    # a single token attends to itself with weight 1 whatever the logits
    torch.testing.assert_close(mixer(x, SequenceLayout.from_lengths([1])), before)


def test_wrong_specs_are_refused():
    good = {
        "kind": "gqa",
        "query": nn.Parameter(torch.zeros(8, 3)),
        "key": nn.Parameter(torch.zeros(4, 3)),
        "num_heads": 4,
        "num_kv_heads": 2,
        "nope_dim": 2,
        "max_logits": lambda: torch.zeros(4),
        "reset": lambda: None,
    }
    QKClipSpec(**good)
    for change, message in [
        ({"kind": "mqa"}, "kind must be one of"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"kind": "mha"}, "num_kv_heads must equal num_heads=4 for kind mha"),
        ({"query": nn.Parameter(torch.zeros(7, 3))}, "query must have 8 rows"),
        ({"key": nn.Parameter(torch.zeros(8, 3))}, "key must have 4 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            QKClipSpec(**{**good, **change})
