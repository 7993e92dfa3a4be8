"""The boundary plan: its steps are the ones of the design, and executing them on integers equals the unsharded stack."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import simulate, unsharded

from tpfuse.parallel import ConfigError, Op, ParallelConfig, Step, plan


def steps(config, layers):
    return [[str(step) for step in boundary.steps] for boundary in plan(config, layers).boundaries]


SHARED = ["all_reduce(attn_tp)", "add", "norm"]


@pytest.mark.parametrize(
    ("sizes", "expected", "fuses"),
    [
        ((4, 1, 1, None), [["norm"], SHARED, ["all_reduce(dense_tp)", "add", "norm"]], ["-", "yes", "yes"]),
        ((4, 2, 1, 2), [["norm"], SHARED, ["all_reduce(dense_tp)", "add", "norm"]], ["-", "yes", "yes"]),
        (
            (4, 2, 1, 4),
            [
                ["norm"],
                [*SHARED, "gather_blocks(attn_dp)"],
                ["all_reduce(dense_tp)", "slice_rows", "add", "norm"],
            ],
            ["-", "yes", "yes"],
        ),
        (
            (4, 2, 1, 1),
            [
                ["norm"],
                ["slice_residual", "reduce_scatter(attn_tp)", "add", "norm"],
                ["add", "gather_residual(attn_tp)", "norm"],
            ],
            ["-", "yes", "-"],
        ),
        ((4, 4, 1, 1), [["norm"], ["add", "norm"], ["add", "norm"]], ["-", "-", "-"]),
    ],
)
def test_steps_of_one_dense_layer(sizes, expected, fuses):
    config = ParallelConfig(*sizes)
    assert steps(config, ["dense"]) == expected
    assert [boundary.fuses for boundary in plan(config, ["dense"]).boundaries] == fuses


def test_a_scattered_residual_is_gathered_before_the_replica_needs_it():
    config = ParallelConfig(4, 2, 1, 1)
    into_attention, into_moe = plan(config, ["dense", "moe"]).boundaries[2:4]
    assert [str(s) for s in into_attention.steps] == ["add", "norm", "all_gather(attn_tp)"]
    assert [str(s) for s in into_moe.steps] == [
        "gather_residual(attn_tp)",
        "all_reduce(attn_tp)",
        "add",
        "norm",
        "gather_blocks(attn_dp)",
    ]
    assert into_moe.fuses == "yes"


def test_the_op_gathers_over_one_axis():
    both = plan(ParallelConfig(8, 2, 2), ["moe"]).boundaries[1]
    assert [str(s) for s in both.after_norm] == ["gather_blocks(attn_cp)", "gather_blocks(attn_dp)"]
    assert both.fuses == "first part"
    assert plan(ParallelConfig(8, 1, 2), ["moe"]).boundaries[1].fuses == "yes"


def test_two_scattered_layers_keep_the_residual_scattered():
    boundary = plan(ParallelConfig(4, 2, 1, 1), ["dense", "dense"]).boundaries[3]
    assert [str(s) for s in boundary.steps] == ["reduce_scatter(attn_tp)", "add", "norm"]


def test_with_the_shared_group_experts_still_span_all_ranks():
    reductions = plan(ParallelConfig(4, 2, 1, 2), ["dense", "moe"]).reductions()
    assert [(r.layer, r.role, r.group, r.fuses) for r in reductions] == [
        (0, "attention", "attn_tp", True),
        (0, "mlp", "dense_tp", True),
        (1, "attention", "attn_tp", True),
        (1, "mlp", "tp", True),
    ]


def test_the_plan_prints_as_a_table_with_the_ranks_of_a_rank():
    lines = plan(ParallelConfig(4, 2, 1, 2), ["dense", "moe"]).table(rank=2).splitlines()
    assert lines[0].split() == ["layer", "into", "rows", "residual", "steps", "fuses"]
    assert len(lines) == 6
    assert "all_reduce(attn_tp [2,3]) → add → norm" in lines[2]
    assert lines[2].endswith("yes")
    assert "gather_blocks(attn_dp [0,2])" in lines[4]


def test_a_plan_of_what_is_no_config_or_no_list_is_refused():
    with pytest.raises(TypeError, match="the config is 4, of type int; give a tpfuse.parallel.ParallelConfig"):
        plan(4, ["dense"])
    with pytest.raises(TypeError, match=r"layers is 'dense'; give the kind of each layer, e.g. \['dense'\] \* 32"):
        plan(ParallelConfig(4), "dense")


def test_unknown_layers_and_replicated_experts_are_refused():
    with pytest.raises(ConfigError, match="unknown kind of layer 'conv'; valid are 'dense' and 'moe'"):
        plan(ParallelConfig(4), ["conv"])
    with pytest.raises(ConfigError, match="moe_dp_size=2: no plan is known"):
        plan(ParallelConfig(4, moe_dp_size=2), ["moe"])


def divisors(n):
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


@st.composite
def deployments(draw):
    tp = draw(st.integers(1, 8))
    dp = draw(divisors(tp))
    cp = draw(divisors(tp // dp))
    k = draw(st.sampled_from([None, 1, tp // (dp * cp), tp]))
    config = ParallelConfig(tp, dp, cp, k, ep_size=draw(divisors(tp)))
    layers = draw(st.lists(st.sampled_from(["dense", "moe"]), min_size=0, max_size=5))
    row = st.integers(0, 10_006)
    blocks = draw(st.lists(st.lists(row, max_size=7), min_size=dp * cp, max_size=dp * cp))
    return config, layers, blocks


@settings(max_examples=400, deadline=None)
@given(deployments())
@pytest.mark.long
def test_the_plan_on_integers_equals_the_unsharded_computation(deployment):
    config, layers, blocks = deployment
    boundaries = plan(config, layers)
    expected = [unsharded(boundaries, block) for block in blocks]
    for rank, rows in enumerate(simulate(boundaries, blocks)):
        assert rows == expected[rank // config.attn_tp_size]


def without(boundaries, op):
    """The plan with one kind of step left out: the mistake that the simulation has to notice."""
    return replace(
        boundaries,
        boundaries=tuple(replace(b, steps=tuple(s for s in b.steps if s.op is not op)) for b in boundaries.boundaries),
    )


def with_group(boundaries, group, other):
    return replace(
        boundaries,
        boundaries=tuple(
            replace(b, steps=tuple(Step(s.op, other) if s.group == group else s for s in b.steps))
            for b in boundaries.boundaries
        ),
    )


@pytest.mark.parametrize(
    ("sizes", "layers", "damage"),
    [
        ((4, 2, 1, 2), ["dense"], lambda p: with_group(p, "dense_tp", "tp")),
        ((4, 2, 1, 4), ["dense"], lambda p: with_group(p, "dense_tp", "attn_tp")),
        ((4, 2, 1, 2), ["dense"], lambda p: without(p, Op.ALL_REDUCE)),
        ((4, 2, 2, 4), ["moe"], lambda p: with_group(p, "attn_cp", "attn_dp")),
    ],
)
def test_the_simulation_notices_a_wrong_group_and_a_missing_sum(sizes, layers, damage):
    config = ParallelConfig(*sizes)
    boundaries = plan(config, layers)
    blocks = [[5 * b + i for i in range(3)] for b in range(config.row_blocks)]
    expected = [unsharded(boundaries, blocks[rank // config.attn_tp_size]) for rank in range(4)]
    assert simulate(boundaries, blocks) == expected
    assert simulate(damage(boundaries), blocks) != expected
