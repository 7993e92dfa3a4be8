"""ParallelConfig: rank lists equal the formulas for every legal combination, and sharing is decided by them."""

import itertools

import pytest

from tpfuse.parallel import GROUP_NAMES, ConfigError, ParallelConfig


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def all_configs():
    for tp in range(1, 17):
        attention = [(dp, cp) for dp in divisors(tp) for cp in divisors(tp // dp)]
        experts = [(ep, moe_dp) for ep in divisors(tp) for moe_dp in divisors(tp // ep)]
        for (dp, cp), (ep, moe_dp), pp in itertools.product(attention, experts, (1, 2, 3)):
            for k in {None, 1, tp // (dp * cp), tp}:
                yield ParallelConfig(tp, dp, cp, k, ep, moe_dp, pp)


def coordinates(config, rank):
    """The formulas of the three axes, applied to one rank."""
    stage, in_stage = divmod(rank, config.tp_size)
    attention, attn_tp = divmod(in_stage, config.attn_tp_size)
    dp, cp = divmod(attention, config.attn_cp_size)
    experts, moe_tp = divmod(in_stage, config.moe_tp_size)
    moe_dp, ep = divmod(experts, config.ep_size)
    block, _ = divmod(in_stage, config.dense_tp_size)
    return {
        "tp": (stage,),
        "attn_tp": (stage, dp, cp),
        "attn_cp": (stage, dp, attn_tp),
        "attn_dp": (stage, cp, attn_tp),
        "dense_tp": (stage, block),
        "moe_tp": (stage, moe_dp, ep),
        "moe_ep": (stage, moe_dp, moe_tp),
        "moe_dp": (stage, ep, moe_tp),
        "pp": (in_stage,),
    }


@pytest.mark.long
def test_rank_lists_equal_the_formulas_for_every_legal_combination_up_to_16():
    count = 0
    for config in all_configs():
        where = [coordinates(config, rank) for rank in range(config.world_size)]
        for name in GROUP_NAMES:
            expected = {}
            for rank in range(config.world_size):
                expected.setdefault(where[rank][name], []).append(rank)
            assert config.groups(name) == sorted(expected.values()), (config, name)
        shares = config.attn_tp_size > 1 and config.dense_tp_size == config.attn_tp_size
        assert config.dense_shares_attention is shares
        count += 1
    assert count > 4000


@pytest.mark.parametrize(
    ("sizes", "pp", "attention", "dense", "shared"),
    [
        ((8, 1, 1, 8), 1, list(range(8)), list(range(8)), True),
        ((8, 2, 1, 4), 1, [4, 5, 6, 7], [4, 5, 6, 7], True),
        ((8, 4, 1, 2), 1, [4, 5], [4, 5], True),
        ((8, 2, 1, 8), 1, [4, 5, 6, 7], list(range(8)), False),
        ((8, 2, 1, 1), 1, [4, 5, 6, 7], [5], False),
        ((8, 8, 1, 1), 1, [5], [5], False),
        ((4, 2, 1, 2), 2, [4, 5], [4, 5], True),
    ],
)
def test_groups_and_sharing_at_rank_5(sizes, pp, attention, dense, shared):
    config = ParallelConfig(*sizes, pp_size=pp)
    assert config.group_of("attn_tp", 5) == attention
    assert config.group_of("dense_tp", 5) == dense
    assert config.dense_shares_attention is shared


def test_no_group_crosses_a_pipeline_stage():
    config = ParallelConfig(4, 2, 1, 2, pp_size=2)
    for name in GROUP_NAMES:
        for group in config.groups(name):
            stages = {rank // 4 for rank in group}
            assert (stages == {0, 1}) if name == "pp" else (len(stages) == 1)
    assert config.group_of("pp", 5) == [1, 5]


@pytest.mark.parametrize(
    ("sizes", "k", "attn_tp"), [((8, 2, 1, 2), 2, 4), ((4, 1, 1, 2), 2, 4), ((8, 2, 2, 4), 4, 2), ((8, 1, 1, 3), 3, 8)]
)
def test_an_impossible_moe_dense_tp_size_names_the_sizes_and_what_is_valid(sizes, k, attn_tp):
    with pytest.raises(ConfigError) as raised:
        ParallelConfig(*sizes)
    text = str(raised.value)
    assert f"moe_dense_tp_size={k} is not possible with attn_tp_size={attn_tp} and tp_size={sizes[0]}" in text
    valid = text.split("valid are")[1]
    assert all(f"{size} (" in valid for size in ("None", 1, attn_tp, sizes[0]))


def test_k_equal_to_tp_over_dp_but_not_attn_tp_names_context_parallelism():
    with pytest.raises(ConfigError, match="4 is tp_size / attn_dp_size, but attn_cp_size=2 splits"):
        ParallelConfig(8, 2, 2, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tp_size": 0}, "tp_size=0 is not a size"),
        ({"tp_size": 4, "pp_size": True}, "pp_size=True is not a size"),
        ({"tp_size": 8, "attn_dp_size": 3}, r"attn_dp_size \* attn_cp_size = 3 \* 1 does not divide tp_size=8"),
        ({"tp_size": 8, "ep_size": 4, "moe_dp_size": 4}, r"ep_size \* moe_dp_size = 4 \* 4 does not divide tp_size=8"),
    ],
)
def test_sizes_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**kwargs)


def test_unknown_group_and_unknown_rank():
    config = ParallelConfig(4, 2)
    with pytest.raises(ConfigError, match="unknown group 'mlp'; valid names are tp, attn_tp"):
        config.groups("mlp")
    with pytest.raises(ConfigError, match="rank 4 does not exist; this config has ranks 0 to 3"):
        config.group_of("tp", 4)


@pytest.mark.parametrize(
    ("sizes", "moe_a2a", "expected"),
    [
        ((8, 2, 1, None), False, False),
        ((8, 2, 1, None), True, True),
        ((8, 2, 1, 4), False, True),
        ((8, 2, 1, 1), False, True),
        ((8, 8, 1, 1), False, False),
        ((8, 8, 1, None), True, False),
        ((8, 1, 1, None), True, True),
        ((8, 1, 1, 1), False, True),
        ((8, 1, 1, None), False, False),
    ],
)
def test_requires_attn_tp_gather(sizes, moe_a2a, expected):
    assert ParallelConfig(*sizes).requires_attn_tp_gather(moe_a2a) is expected
