"""CUDA graphs are never silently wrong: operators are left out of Inductor's; a layer that is captured in another way says so.

Nothing here needs a GPU: what is asked of one is answered by a stand-in.
"""

from types import SimpleNamespace

import pytest
import torch

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.errors import UnsupportedError
from losia_dist.subnet import experts_operator, operator
from losia_dist.subnet.capture import refuse_capture
from losia_dist.subnet.experts_function import experts_backward, experts_forward
from losia_dist.subnet.function import embedding_backward, embedding_forward, subnet_backward, subnet_forward

ON_A_GPU = SimpleNamespace(is_cuda=True)
SITE = SimpleNamespace(name="layers.0.q_proj")
COMPUTED = {
    "linear": lambda x: subnet_forward(SITE, x, None, None, None),
    "linear, backward": lambda x: subnet_backward(SITE, x, None, None, None, None, needs_x=True, needs_subnet=True),
    "embedding": lambda x: embedding_forward(SITE, x, None, None),
    "embedding, backward": lambda x: embedding_backward(SITE, x, None, None, None, None, None),
    "experts": lambda x: experts_forward([SITE], x, None, None, None, None, []),
    "experts, backward": lambda x: experts_backward(
        [SITE], x, None, None, None, None, None, [], [None], needs_x=True, needs_subnets=True
    ),
}


def test_every_operator_is_left_out_of_inductors_graphs():
    assert operator and experts_operator
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("losia_dist::")]
    assert len(names) == 6
    for name in names:
        found = getattr(torch.ops.losia_dist, name.removeprefix("losia_dist::")).default
        assert torch.Tag.cudagraph_unsafe in found.tags, name


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=list(COMPUTED))
def test_whatever_reads_a_sites_state_refuses_to_be_captured(monkeypatch, compute):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q_proj runs while a CUDA graph is captured.*make_graphed"):
        compute(ON_A_GPU)


def test_outside_of_a_capture_nothing_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(1) or False)
    refuse_capture("layers.0.q_proj", ON_A_GPU)
    assert asked == [1]


def test_on_a_cpu_no_device_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("a GPU was asked"))
    model = get_losia_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoSiAConfig(rank_factor=0.25))
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert model[0].subnet.grad is not None
