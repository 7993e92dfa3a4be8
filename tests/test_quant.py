"""``tpfuse::all_reduce_add_rms_norm_quant`` on gloo ranks: the bytes and scales of each library's own arithmetic, and errors."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from quantizations import THEIRS, hard_rows
from ranks import RankPool
from tpfuse.ops.flavour import LLAMA
from tpfuse.ops.quant_reference import quantize, scales_like
from tpfuse.ops.quantizer import NAMED, Quantizer
from tpfuse.ops.schedule import largest_launches
from tpfuse.ops.select import QUANT_ROWS
from tpfuse.ops.settings import Settings


def bits(t: torch.Tensor) -> torch.Tensor:
    """What can be compared bit for bit, with one NaN."""
    if t.dtype == torch.int32:
        return t
    wide = t.to(torch.float32)
    return torch.where(wide.isnan(), torch.full_like(wide, float("nan")), wide).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(THEIRS))
def test_a_quantization_has_the_bits_of_the_library_it_is_named_after(name, dtype):
    quantizer, scale = NAMED[name], torch.tensor(0.037)
    for hidden in (256, 2880, 200):
        x = hard_rows(24, hidden, hidden).to(dtype).view(4, 6, hidden)
        got = quantize(x, quantizer, scale if quantizer.granularity == "tensor" else None)
        want = THEIRS[name](x, scale)
        assert got[0].dtype == torch.float8_e4m3fn and got[0].is_contiguous()
        for g, w in zip(got, want, strict=True):
            assert torch.equal(bits(g), bits(w)) and g.shape == w.shape, (name, hidden)


@pytest.mark.parametrize("shape", [(0, 256), (3, 256), (2, 3, 1000), (640,)], ids=str)
def test_layouts_of_scales(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    row = NAMED["deepseek-ue8m0"]
    plain = quantize(x, row)[1]
    column = quantize(x, replace(row, layout="column"))[1]
    packed = quantize(x, replace(row, layout="ue8m0"))[1]
    groups, rows = -(-shape[-1] // 128), x.numel() // shape[-1]
    aligned = -(-rows // 4) * 4
    assert plain.shape == column.shape == (*shape[:-1], groups) and plain.is_contiguous()
    assert torch.equal(plain, column) and column.stride(-1) == aligned
    assert packed.dtype == torch.int32 and packed.shape == (*shape[:-1], -(-groups // 4))
    assert packed.stride(-1) == aligned
    for group in range(groups):
        exponent = packed[..., group // 4] >> group % 4 * 8 & 0xFF
        assert torch.equal(torch.exp2((exponent - 127).float()), plain[..., group])


@pytest.mark.parametrize("quantizer", [*NAMED.values(), Quantizer(dtype="e5m2", saturate="none")], ids=str)
def test_a_quantizer_travels_as_text(quantizer):
    assert Quantizer.parse(str(quantizer)) == quantizer
    assert quantizer.dtype in quantizer.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({f.name: "other"}, f"quantizer {f.name}='other' is not valid") for f in fields(Quantizer) if f.name != "floor"),
        ({"floor": -1.0}, "quantizer floor=-1.0 is not valid"),
        ({"floor": float("inf")}, "quantizer floor=inf is not valid"),
        ({"layout": "column"}, "layout='column' with granularity='token'"),
        ({"layout": "ue8m0", "granularity": "group128"}, "use power_of_two='log2' or 'bits'"),
        ({"granularity": "tensor", "compute": "input"}, "leave compute at the default"),
        ({"derive": "inverse"}, "derive the factor that 'mul' multiplies by"),
        ({"floor_at": "scale"}, "nothing is bounded"),
        ({"floor": 1e-4, "floor_at": "rounded"}, "use floor_at='scale'"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match="quantizer") as error:
        Quantizer(**change)
    assert message in str(error.value)


def test_a_text_that_is_none_is_told():
    with pytest.raises(ValueError, match="has 1 fields; expected 12: dtype/granularity"):
        Quantizer.parse("e4m3")


def test_a_number_divided_by_a_tensor_is_a_product_with_its_reciprocal():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    amax = x.abs().amax(-1, keepdim=True)
    q = Quantizer(derive="inverse_recip", apply="mul", returned="reciprocal")
    quantized, scales = quantize(x, q)
    assert torch.equal(scales, 448.0 / amax) and torch.equal(quantized, (x * (448.0 / amax)).to(torch.float8_e4m3fn))
    assert not torch.equal(quantize(x, replace(q, derive="inverse"))[1], scales)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_values_beyond_the_largest_saturate_or_become_what_torch_makes_of_them(dtype):
    q = Quantizer(dtype=dtype, granularity="tensor")
    x = torch.tensor([[1e6, -1e6, 1.0]])
    clamped = quantize(x, q, torch.tensor(1.0))[0]
    assert clamped.dtype == q.torch_dtype and clamped.float().tolist() == [[q.largest, -q.largest, 1.0]]
    free = quantize(x, replace(q, saturate="none"), torch.tensor(1.0))[0]
    assert torch.equal(bits(free), bits(x.to(q.torch_dtype)))
    assert dtype == "e4m3" or free.float().tolist() == [[float("inf"), float("-inf"), 1.0]]


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def unfused_and_fused(rank, world, name, dtype, hidden, options):
    """Whether the op's results are those of the group's all-reduce, the model's add and norm, and the library's arithmetic."""
    from tpfuse.ops import LLAMA, all_reduce_add_rms_norm_quant, reference

    c10d = torch.ops._c10d_functional
    group = torch.distributed.group.WORLD.group_name
    quantizer, scale = NAMED[name], torch.tensor(0.037)
    shared = torch.Generator().manual_seed(7)
    weight = torch.rand(hidden, generator=shared).to(dtype)
    found = []
    for rows in (0, 1, 2, 17, 300):
        x = hard_rows(rows, hidden, 10 * rows + rank).to(dtype)
        residual = hard_rows(rows, hidden, 5 + rows).to(dtype)
        got = all_reduce_add_rms_norm_quant(
            x,
            residual,
            weight,
            quantizer=quantizer,
            static_scale=scale if quantizer.granularity == "tensor" else None,
            **options,
        )
        summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) if rows else x
        normed, out = reference.add_rms_norm(
            summed, residual, weight, None, 1e-6, 1.0, LLAMA, options.get("post_norm", False)
        )
        quantized, scales = THEIRS[name](normed, scale)
        wanted = (quantized, scales, normed if options.get("keep_normed") else normed.new_empty(0), out)
        found.append([g.shape == w.shape and torch.equal(bits(g), bits(w)) for g, w in zip(got, wanted, strict=True)])
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("dtype", "hidden", "options"),
    [
        (torch.bfloat16, 4096, {}),
        (torch.bfloat16, 2880, {"keep_normed": True}),
        pytest.param(torch.bfloat16, 7168, {}, marks=pytest.mark.slow),
        pytest.param(torch.float16, 2880, {"post_norm": True, "keep_normed": True}, marks=pytest.mark.slow),
        pytest.param(torch.float32, 4096, {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", sorted(THEIRS))
def test_the_op_has_the_bits_of_the_unfused_graph(pool, name, dtype, hidden, options):
    for found in pool.run(unfused_and_fused, name, dtype, hidden, options):
        assert found == [[True] * 4] * 5


def compiled(rank, world):
    """The op in a compiled graph with any number of rows: one graph, the bits and strides of an eager call."""
    from tpfuse.ops import all_reduce_add_rms_norm_quant

    quantizer = NAMED["deepgemm-ue8m0"]
    weight = torch.rand(640, generator=torch.Generator().manual_seed(7)).bfloat16()

    def model(x, residual):
        return all_reduce_add_rms_norm_quant(x, residual, weight, quantizer=quantizer, keep_normed=True)

    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    with torch.no_grad():
        for rows in (2, 5, 9):
            x = torch.randn(rows, 3, 640, generator=torch.Generator().manual_seed(rank)).bfloat16()
            for a, b in zip(run(x, x), model(x, x), strict=True):
                found.append(torch.equal(bits(a), bits(b)) and a.stride() == b.stride())
    return found


@pytest.mark.ranks
def test_it_compiles_in_one_graph_for_any_number_of_rows(pool):
    assert pool.run(compiled) == [[True] * 12] * 2


def refusals(rank, world):
    from tpfuse.ops import all_reduce_add_rms_norm_quant as op

    x, w = torch.ones(4, 64), torch.ones(64)
    static, token = NAMED["vllm-static"], NAMED["vllm-token"]
    calls = {
        "missing": lambda: op(x, x, w, quantizer=static),
        "unwanted": lambda: op(x, x, w, quantizer=token, static_scale=torch.ones(())),
        "dtype": lambda: op(x, x, w, quantizer=static, static_scale=torch.ones((), dtype=torch.bfloat16)),
        "count": lambda: op(x, x, w, quantizer=static, static_scale=torch.ones(4)),
        "fp64": lambda: op(x.double(), x.double(), w.double(), quantizer=token),
        "text": lambda: op(x, x, w, quantizer="e4m3"),
        "weight": lambda: op(x, x, None, quantizer=token),
        "columns": lambda: op(x[:, :0], x[:, :0], w[:0], quantizer=token),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


@pytest.mark.ranks
def test_what_does_not_fit_is_named_before_anybody_communicates(pool):
    for messages in pool.run(refusals):
        assert "static_scale is None, but the quantizer's granularity is 'tensor'" in messages["missing"]
        assert "static_scale is torch.float32 (), but the quantizer's granularity is 'token'" in messages["unwanted"]
        assert "expected one torch.float32 value" in messages["dtype"]
        assert "static_scale is torch.float32 (4,)" in messages["count"]
        assert "expected torch.float32, torch.bfloat16 or torch.float16" in messages["fp64"]
        assert "has 1 fields" in messages["text"]
        assert "weight is None" in messages["weight"]
        assert "at least one column" in messages["columns"]


def test_the_schema_tells_of_scales_for_any_rows():
    assert scales_like((), NAMED["vllm-static"]) == ((0,), (1,), torch.float32)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(7, 1000, dtype=torch.bfloat16)
        quantized, scales, normed, residual = torch.ops.tpfuse.all_reduce_add_rms_norm_quant(
            x, x, None, None, 1e-6, 1.0, "float32/mean/rsqrt/input/none/own/promoted", False, "0",
            str(replace(NAMED["deepseek-ue8m0"], layout="column")), None, False,
        )  # fmt: skip
    assert (quantized.dtype, quantized.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scales.shape, scales.stride()) == ((7, 8), (1, 8))
    assert (normed.shape, normed.dtype, residual.shape) == ((0,), torch.bfloat16, x.shape)


def checked(rank, world):
    """torch's own checks of an operator: schema, fake, no alias, traced as eager."""
    op = torch.ops.tpfuse.all_reduce_add_rms_norm_quant.default
    group = torch.distributed.group.WORLD.group_name
    x, weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(rank)), torch.ones(256)
    found = []
    for name, static in (("vllm-static", torch.tensor(0.037)), ("vllm-token", None), ("deepgemm-ue8m0", None)):
        for keep in (False, True):
            args = (x, x.clone(), weight, None, 1e-6, 1.0, str(LLAMA), False, group, str(NAMED[name]), static, keep)
            found.append(set(torch.library.opcheck(op, args, test_utils=CHECKS).values()))
    return found


CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.ranks
def test_torchs_checks_of_an_operator_find_nothing(pool):
    assert pool.run(checked) == [[{"SUCCESS"}] * 6] * 2


def test_up_to_how_many_rows_it_is_one_kernel_is_a_setting_that_ranks_compare(monkeypatch):
    assert Settings.from_environment().quant_rows == QUANT_ROWS == 256
    monkeypatch.setenv("TPFUSE_QUANT_ROWS", "64")
    more = Settings.from_environment()
    assert more.quant_rows == 64 and more.fingerprint() != replace(more, quant_rows=16).fingerprint()
    monkeypatch.setenv("TPFUSE_QUANT_ROWS", "-1")
    with pytest.raises(ValueError, match="TPFUSE_QUANT_ROWS='-1' is not valid; expected a whole number of at least 0"):
        Settings.from_environment()


def test_kernels_that_quantize_are_loaded_for_the_rows_that_they_get():
    def largest(**options):
        return largest_launches("sm_90", 4, torch.bfloat16, 4096, Settings(), **options)

    # One-shot up to 248 KiB, which is 31 rows; two-shot in launches of 8 MiB above.
    assert largest() == {"one_shot": 31, "two_shot": 1024}
    assert largest(most=16) == {"one_shot": 16}
    assert largest(most=40) == {"one_shot": 31, "two_shot": 40}
