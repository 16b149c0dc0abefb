"""The MoBA layer under `torch.compile`, with graph breaks: numbers and gradients are those without, in either mode."""

import pytest
import torch

from perilune.nn import MoBAConfig, MoBAttention, initialize
from tests.nn.helpers import D_MODEL, MOBA, packed_input


def values_and_gradients(call, layer, x, layout):
    x = x.clone().requires_grad_()
    y = call(x, layout)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


# what torch.compile itself does where a graph breaks, and with an autograd.Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_switch_of_mode_invalidates_compiled_graphs():
    layer = initialize(MoBAttention(MoBAConfig(**MOBA, use_rope=False), D_MODEL), seed=0, init_range=0.4).double()
    x, layout = packed_input((9,))
    graphs, outputs, counts = [], [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend)
    for mode in ("moba", "full", "moba"):
        layer.set_mode(mode)
        found, expected = (values_and_gradients(call, layer, x, layout) for call in (compiled, layer))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        outputs.append(found[0])
        counts.append(len(graphs))
    assert 0 < counts[0] < counts[1] == counts[2]
    assert not torch.allclose(outputs[0], outputs[1])
