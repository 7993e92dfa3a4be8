"""What the op promises besides its numbers: no silent gradients, symbols without values, imports without Triton."""

from __future__ import annotations

import subprocess
import sys

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


SCALES = {
    r"scale_tensor is torch.bfloat16 \(\) on cpu; expected one value without dimensions, torch.float32 \(\) on cpu": (
        torch.tensor(2.0, dtype=torch.bfloat16)
    ),
    r"scale_tensor is torch.float32 \(1,\)": torch.tensor([2.0]),
    r"scale_tensor is torch.float32 \(\) on meta": torch.tensor(2.0, device="meta"),
    "scale_tensor requires grad": torch.tensor(2.0, requires_grad=True),
}


@pytest.mark.parametrize("message", SCALES)
def test_a_scale_tensor_that_does_not_fit_is_refused_by_name(message):
    x, residual, weight = operands()
    with torch.set_grad_enabled("grad" in message), pytest.raises((ValueError, RuntimeError), match=message):
        OP(x, residual, weight, scale=SCALES[message])


def test_a_scale_is_a_number_or_a_tensor_not_both():
    x, residual, weight = operands()
    given = (x, residual, weight, None, 1e-6, 3.0, str(tpfuse.ops.LLAMA), False, dist.group.WORLD.group_name)
    with torch.no_grad(), pytest.raises(ValueError, match=r"scale is 3.0 beside a scale_tensor; pass one of the two"):
        torch.ops.tpfuse.all_reduce_add_rms_norm(*given, torch.tensor(2.0))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_scale_tensor_gives_what_its_number_gives_also_into_given_outputs(inner):
    """A number is compiled in; a tensor is read in each call."""
    torch._dynamo.reset()
    run = OP if inner == "eager" else torch.compile(OP, backend=inner)
    x, residual, weight = operands()
    scale, bias = torch.tensor(1.0), torch.randn(H)
    for value in (0.5, 3.0):
        scale.fill_(value)
        for first in (False, True):
            more = {"bias": bias, "scale_first": first}
            with torch.no_grad():
                want = OP(x, residual, weight, scale=value, **more)
                assert graphs.equal(run(x, residual, weight, scale=scale, **more), want)
                out = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
                assert graphs.equal(run(x, residual, weight, scale=scale, out=out, **more), want)
                assert graphs.equal(out, want)


# -- without Triton -------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Blocked())
import torch, torch.distributed as dist
import tpfuse
from tpfuse.ops import vote
from tpfuse.ops.flavour import LLAMA
from tpfuse.ops.kernels.variant import supports

alone = sys.argv[1:] == ["alone"]  # one rank of two, whose sums are its own
if alone:
    from tpfuse import compat
    compat.start_fake_group(2, 0)
else:
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
r, w, *parts = torch.randn(3, 16), torch.randn(16), torch.randn(3, 16), torch.randn(3, 16)
x = parts[dist.get_rank()]
normed, total = tpfuse.ops.all_reduce_add_rms_norm(x, r, w)
assert torch.equal(total, r + (x if alone else parts[0] + parts[1]))

def f(x, r, w):
    x = x.clone()
    dist.all_reduce(x)
    h = r + x
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), h

with torch.no_grad():
    compiled = torch.compile(f, backend="tpfuse", options={"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"})
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, r, w), f(x, r, w)))
assert [site.fused for site in tpfuse.reports()[-1].sites] == [True]
assert supports(torch.bfloat16, None, 4096, LLAMA) == "Triton is not installed"
assert "Triton is not installed" in vote._problem(2, torch.device("cpu"))
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
from tpfuse.inspect import doctor
(seen,) = (c for c in doctor.versions() if c.name == "triton")
assert seen.status in ("note", "warn") and "import" in seen.found, "its metadata is here, and that is no proof"
sys.argv[1:] = ["doctor", "--json"]
from tpfuse.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("fine")
"""


@pytest.mark.ranks
@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def test_everything_but_the_kernels_works_without_triton(alone, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TRITON]
    ranks = [
        subprocess.Popen([*command, *of_rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for of_rank in ([["alone"]] if alone else [[str(tmp_path / "store"), rank] for rank in "01"])
    ]
    try:
        for rank in ranks:
            said, errors = rank.communicate(timeout=800)
            assert said.strip().endswith("fine"), errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_triton_still_starts_a_compiled_kernel_as_the_direct_launch_does():
    """A canary: where it fails, the public launch is used, which costs time on the CPU; adapt ops/kernel.py."""
    from tpfuse.ops import kernel

    assert kernel.direct_launch_is_known()


@pytest.mark.parametrize("loads", ["as before", "with other arguments"])
def test_a_kernel_of_the_public_launch_is_loaded_before_a_peer_waits_for_it(loads, monkeypatch):
    from tpfuse.ops import kernel

    loaded = []

    class Compiled:
        def _init_handles(self, *further):
            if loads != "as before" and not further:
                raise TypeError("missing 1 required positional argument")
            loaded.append(self)

    class Function:
        def warmup(self, *args, **options):
            return Compiled()

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    launched = []
    monkeypatch.setattr(kernel, "direct_launch_is_known", lambda: False)
    kernel._warn_of_public_launch.cache_clear()
    ours = kernel.Kernel(Function(), 256, ())
    with pytest.warns(RuntimeWarning, match="public launch"):
        ours.compile(torch.ones(1))
    assert len(loaded) == (loads == "as before")
    ours(3, 0, "x")
    assert launched == [(3,)]


def test_another_private_launch_interface_is_noticed_and_the_public_one_used(monkeypatch):
    from tpfuse.ops import kernel

    launched = []

    class Function:
        def warmup(self, *args, **options):
            return object()  # nothing that this code knows of

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options))

    kernel._warn_of_public_launch.cache_clear()
    ours = kernel.Kernel(Function(), 256, ("constant",), maxnreg=64)
    with pytest.warns(RuntimeWarning, match="public launch"):
        ours.compile(torch.ones(1), 3)
    ours(7, 0, "x", 3)
    assert launched == [((7,), ("x", 3, "constant"), {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 64})]


# -- what is loaded -------------------------------------------------------------------------------------------------


def test_a_built_library_is_loaded_from_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    from tpfuse.measure import other_libraries

    monkeypatch.delenv("TPFUSE_BENCH_BUILD", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = other_libraries.private_folder()
    assert folder == tmp_path / "tpfuse" / "build" and folder.stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for other in (shared, link):
        monkeypatch.setenv("TPFUSE_BENCH_BUILD", str(other))
        with pytest.raises(other_libraries.Unavailable, match="not a folder of this user alone"):
            other_libraries.private_folder()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    from tpfuse.measure import other_libraries

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("TPFUSE_BENCH_BUILD", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(other_libraries.Path, "home", nobody)
    with pytest.raises(other_libraries.Unavailable, match="name another with TPFUSE_BENCH_BUILD"):
        other_libraries.private_folder()


def test_a_built_library_has_another_name_for_another_source_version_and_architecture():
    from tpfuse.measure.other_libraries import library_name

    names = {
        library_name(*parts) for parts in (("a", "1", "90a"), ("b", "1", "90a"), ("a", "2", "90a"), ("a", "1", "80"))
    }
    assert len(names) == 4


# -- outputs that the caller gives ---------------------------------------------------------------------------------


def written_into(x, residual, weight, out):
    return OP(x, residual, weight, out=out)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_given_outputs_get_what_new_ones_would_have_and_the_residual_may_be_one_of_them(inner):
    torch._dynamo.reset()
    run = written_into if inner == "eager" else torch.compile(written_into, backend=inner)
    with torch.no_grad():
        x, residual, weight = operands()
        wanted = OP(x, residual, weight)
        out = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        assert graphs.equal(run(x, residual, weight, out), wanted) and graphs.equal(out, wanted)
        in_place = torch.full_like(x, float("nan")), residual
        run(x, residual, weight, in_place)
        assert graphs.equal((in_place[0], residual), wanted)
        x, residual, weight = operands()
        wanted = OP(x, residual, weight)
        run(x, residual, weight, (x, residual))
        assert graphs.equal((x, residual), wanted)


def test_outputs_that_do_not_fit_or_share_other_memory_are_refused_by_name():
    x, residual, weight = operands()
    new = torch.empty_like(x)
    store = torch.empty(4 * x.numel())
    view = store[: x.numel()].view_as(x)
    cases = {
        r"normed is torch.float32 \(2, 16\)": (torch.empty(2, H), new),
        r"residual_out is torch.bfloat16": (new, torch.empty_like(x, dtype=torch.bfloat16)),
        "normed must be contiguous": (torch.empty(H, 3).t(), new),
        "residual_out must be contiguous and start at a multiple of 16 bytes": (
            new,
            store[1 : 1 + x.numel()].view_as(x),
        ),
        "normed shares memory with residual": (residual, new),
        "residual_out shares memory with x": (new, x),
        "residual_out shares memory with normed": (view, view),
    }
    with torch.no_grad():
        for message, out in cases.items():
            with pytest.raises(ValueError, match=message):
                OP(x, residual, weight, out=out)
        shifted = store[4 : 4 + x.numel()].view_as(x)
        with pytest.raises(ValueError, match="residual_out shares memory with residual"):
            OP(x, view, weight, out=(new, shifted))
