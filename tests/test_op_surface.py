"""What the op promises besides its numbers: no silent gradients, symbols without values, imports without Triton."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist

import tpfuse

H = 16
OP = tpfuse.ops.all_reduce_add_rms_norm


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def operands():
    return torch.randn(3, H), torch.randn(3, H), torch.randn(H)


@pytest.mark.parametrize("which", ["x", "residual", "weight"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_is_refused_with_what_to_do(which, compiled):
    torch._dynamo.reset()
    given = dict(zip(("x", "residual", "weight"), operands(), strict=True))
    given[which].requires_grad_()

    def f(x, residual, weight):
        return OP(x, residual, weight)[0].sum()

    run = torch.compile(f, backend="aot_eager") if compiled else f
    with pytest.raises(
        Exception, match=rf"inference only and has no gradient, but {which} requires grad; call it under"
    ):
        run(**given)
    with torch.no_grad():
        assert not run(**given).requires_grad
    with torch.inference_mode():
        run(**given)


def test_two_symbols_without_values_are_taken_for_equal_and_checked_at_run_time():
    def f(mask, other, weight):
        x, residual = mask.nonzero().float().expand(-1, H), other.nonzero().float().expand(-1, H)
        return OP(x, residual, weight)[1]

    torch._dynamo.reset()
    mask, other, weight = torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 0, 1]), torch.randn(H)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert graphs.equal(compiled(mask, other, weight), f(mask, other, weight))
        with pytest.raises(RuntimeError):
            compiled(mask, torch.ones(4), weight)


def test_symbolic_rows_of_known_value_get_no_further_guard():
    torch._dynamo.reset()
    frames = []

    def keep(gm, inputs):
        frames.append(gm)
        return gm.forward

    compiled = torch.compile(lambda x, r, w: OP(x, r, w)[0], backend=keep, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 7):
            compiled(torch.randn(rows, H), torch.randn(rows, H), torch.randn(H))
    assert len(frames) == 1


def test_shapes_that_do_not_fit_keep_their_message_under_a_compile():
    torch._dynamo.reset()
    x, _, weight = operands()
    with torch.no_grad(), pytest.raises(Exception, match=r"residual is torch.float32 \(2, 16\)"):
        torch.compile(lambda *a: OP(*a)[0], backend="aot_eager")(x, torch.randn(2, H), weight)
