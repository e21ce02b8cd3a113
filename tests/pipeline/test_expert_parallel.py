"""Expert parallelism: where tokens go, in which order, at which price; and that the layer stays the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import config, one_sentence

from refimpl.config.choices import Choices
from refimpl.config.presets import preset
from refimpl.errors import Invalid, Unsupported
from refimpl.layers import gate
from refimpl.pipeline.expert_parallel import layouts, permutation, traffic
from refimpl.pipeline.expert_parallel.dispatch import check_nodes, dispatch
from refimpl.pipeline.expert_parallel.placement import (
    Placement,
    by_rank,
    check_experts,
    evenly,
    most_nodes,
    spread,
)

V3 = evenly(256, 64, 8)


@st.composite
def plans(draw, chosen=4):
    """Any experts on any ranks, also none on some, tokens anywhere, also none at all."""
    nodes, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts, ranks = draw(st.integers(1, 9)), nodes * width
    where = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = by_rank(where, ranks, nodes)
    if draw(st.booleans()):  # local numbers that do not ascend
        placement = Placement(tuple(tuple(rng.permutation(own).tolist()) for own in placement.held), nodes)
    tokens, k = draw(st.integers(0, 12)), draw(st.integers(1, min(experts, chosen)))
    idx = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], np.int64).reshape(tokens, k)
    source = rng.integers(0, ranks, tokens) if draw(st.booleans()) else None
    return dispatch(idx, placement, source)


def random_plan(tokens=200, seed=0, nodes=8):
    """V3's shape: 256 experts, 8 of 4 groups, 8 ranks on each node."""
    cfg = preset("deepseek-v3")
    choice = np.random.default_rng(seed).standard_normal((tokens, 256))
    return dispatch(gate.select(choice, cfg, Choices.named("hf")), evenly(256, 8 * nodes, nodes))


# Placement.


def test_v3_has_four_experts_on_each_rank_and_a_group_on_each_node() -> None:
    assert V3.held[9] == (36, 37, 38, 39)
    assert (V3.rank[37], V3.local[37], V3.node[37]) == (9, 1, 1)
    groups = V3.node.reshape(8, 32)
    assert (groups == np.arange(8)[:, None]).all()


def test_a_user_s_own_map_gives_local_numbers_in_ascending_order() -> None:
    found = by_rank([1, 0, 1, 1], 3)
    assert found.held == ((1,), (0, 2, 3), ())
    assert found == by_rank({3: 1, 0: 1, 2: 1, 1: 0}, 3)
    assert found.local.tolist() == [0, 0, 1, 2]


def test_local_numbers_are_positions_in_a_list_of_one_s_own() -> None:
    found = Placement(((2, 0), (3, 1)), 2)
    assert found.rank.tolist() == [0, 1, 0, 1]
    assert found.local.tolist() == [1, 1, 0, 0]


def test_tokens_are_spread_in_runs() -> None:
    assert spread(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert spread(2, 4).tolist() == [0, 1]
    assert spread(0, 4).tolist() == []


@pytest.mark.parametrize(
    ("make", "kind", "fragments"),
    [
        (lambda: evenly(10, 4), Invalid, ("10 experts", "4 ranks")),
        (lambda: evenly(12, 6, 4), Invalid, ("6 ranks", "4 nodes")),
        (lambda: evenly(0, 1), Invalid, ("experts", "0", "at least 1")),
        (lambda: evenly(4, 2.0), Invalid, ("ranks", "2.0")),
        (lambda: evenly(4, 2, True), Invalid, ("nodes", "True")),
        (lambda: Placement(((0, 1), (3,))), Invalid, ("expert 2", "no rank")),
        (lambda: Placement(((0,), (-1,))), Invalid, ("rank 1", "expert -1")),
        (lambda: Placement(((0,), ("1",))), Invalid, ("rank 1", "'1'", "integers")),
        (lambda: Placement((0, 1)), Invalid, ("rank 0", "list")),
        (lambda: Placement(()), Invalid, ("0 ranks",)),
        (lambda: Placement(((), ())), Invalid, ("0 experts",)),
        (lambda: Placement(((0, 1), (1,))), Unsupported, ("expert 1", "rank 0", "rank 1", "redundant")),
        (lambda: by_rank([0, 2], 2), Invalid, ("expert 1", "rank 2", "0 to 1")),
        (lambda: by_rank([0, 0.5], 2), Invalid, ("expert 1", "rank 0.5", "0 to 1")),
        (lambda: by_rank({0: 0, 2: 0}, 2), Invalid, ("expert 1", "no rank")),
        (lambda: check_experts(config(), evenly(6, 2)), Invalid, ("6 experts", "8")),
        (lambda: dispatch([[0, 4]], evenly(4, 2)), Invalid, ("token 0", "expert 4", "0 to 3")),
        (lambda: dispatch([[0, -1]], evenly(4, 2)), Invalid, ("token 0", "expert -1")),
        (lambda: dispatch([[0.5]], evenly(4, 2)), Invalid, ("idx", "float64")),
        (lambda: dispatch([0], evenly(4, 2)), Invalid, ("idx", "(1,)")),
        (lambda: dispatch([[0], [1]], evenly(4, 2), [0, 2]), Invalid, ("token 1", "rank 2", "0 to 1")),
        (lambda: dispatch([[0], [1]], evenly(4, 2), [0]), Invalid, ("source", "2 tokens")),
        (lambda: check_nodes(dispatch([[0], [0]], V3), 0), Invalid, ("token 0", "1 nodes", "most 0")),
        (lambda: layouts.masked(_rows([0, 0, 0]), 2), Invalid, ("most is 2", "3 tokens")),
        (lambda: layouts.contiguous(_rows([0]), 0), Invalid, ("alignment is 0",)),
        (lambda: layouts.blocks(dispatch([[0]], evenly(1, 1)), 0, 0), Invalid, ("block is 0",)),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, kind, fragments) -> None:
    with pytest.raises(kind) as caught:
        make()
    one_sentence(caught, *fragments)


def _rows(experts):
    return permutation.computed(dispatch(np.array(experts)[:, None], evenly(2, 1)), 0)


# Dispatch.


def test_two_nodes_of_two_ranks_by_hand() -> None:
    """Experts 0 and 1 on rank 0, 2 and 3 on 1 (node 0); 4 and 5 on 2, 6 and 7 on 3 (node 1)."""
    plan = dispatch([[0, 1], [4, 7], [1, 6]], evenly(8, 4, 2), [0, 1, 2])
    assert plan.in_rank.tolist() == [
        [True, False, False, False],
        [False, False, True, True],
        [True, False, False, True],
    ]
    assert plan.nodes_per_token.tolist() == [1, 1, 2]
    # Token 1 of rank 1 lands on rank 3; token 2 of rank 2 lands on rank 0.
    assert plan.over_network.tolist() == [[False, False], [False, True], [True, False]]
    # Token 1 goes on from rank 3 to rank 2, token 2 from its own rank 2 to rank 3.
    assert np.argwhere(plan.forwarded).tolist() == [[1, 2], [2, 3]]
    assert plan.per_rank.tolist() == [2, 0, 1, 2]
    assert plan.per_node.tolist() == [2, 2]
    assert plan.per_expert.tolist() == [1, 2, 0, 0, 1, 0, 1, 1]


@given(plans())
def test_counts_are_those_of_loops(plan) -> None:
    at, (tokens, chosen) = plan.placement, plan.idx.shape
    to_rank = np.zeros((at.ranks, at.ranks), int)
    to_node, to_expert = np.zeros((at.ranks, at.nodes), int), np.zeros((at.ranks, at.experts), int)
    for t in range(tokens):
        owners = {rank for rank, own in enumerate(at.held) if set(own) & set(plan.idx[t].tolist())}
        assert set(np.flatnonzero(plan.in_rank[t])) == owners
        for rank in owners:
            to_rank[plan.source[t], rank] += 1
        for node in {rank // at.ranks_per_node for rank in owners}:
            to_node[plan.source[t], node] += 1
        for k in range(chosen):
            to_expert[plan.source[t], plan.idx[t, k]] += 1
    assert (plan.to_rank == to_rank).all()
    assert (plan.to_node == to_node).all()
    assert (plan.to_expert == to_expert).all()
    assert (plan.per_rank == to_rank.sum(0)).all()
    assert (plan.per_node == to_node.sum(0)).all()
    assert (plan.per_expert == to_expert.sum(0)).all()


@given(plans())
def test_the_hops_bring_every_token_where_it_has_to_be_and_nowhere_else(plan) -> None:
    """A walk over the links: each copy is sent by a rank that has the token, and all are the counted ones."""
    at = plan.placement
    links = {"network_out": [0] * at.ranks, "network_in": [0] * at.ranks}
    links |= {"inside_out": [0] * at.ranks, "inside_in": [0] * at.ranks}
    for t in range(len(plan.idx)):
        own = int(plan.source[t])
        needed = {int(at.rank[e]) for e in plan.idx[t]}
        has = {own}
        for node in {rank // at.ranks_per_node for rank in needed}:
            twin = node * at.ranks_per_node + own % at.ranks_per_node
            if twin not in has:
                has.add(twin)
                links["network_out"][own] += 1
                links["network_in"][twin] += 1
            for rank in needed - has:
                if rank // at.ranks_per_node == node:
                    has.add(rank)
                    links["inside_out"][twin] += 1
                    links["inside_in"][rank] += 1
        assert needed <= has
    found = traffic.loads(plan)
    assert {name: getattr(found, name).tolist() for name in links} == links
    copies = traffic.once_per_node(plan)
    assert copies.total == (sum(links["network_out"]), sum(links["inside_in"]))


def test_a_node_limited_gate_reaches_four_nodes_and_no_more() -> None:
    plan = random_plan()
    assert most_nodes(preset("deepseek-v3"), plan.placement) == 4
    check_nodes(plan, 4)
    assert plan.nodes_per_token.max() == 4
    free = dispatch(np.argsort(np.random.default_rng(1).random((200, 256)), 1)[:, :8], V3)
    assert free.nodes_per_token.max() > 4
    with pytest.raises(Invalid) as caught:
        check_nodes(free, 4)
    one_sentence(caught, "nodes", "at most 4")


@pytest.mark.parametrize(
    ("name", "nodes", "most"),
    [
        ("deepseek-v3", 8, 4),
        ("deepseek-v3", 1, 1),
        ("deepseek-v3", 2, 2),
        ("deepseek-v3", 16, 8),  # a group lies on two nodes
        ("deepseek-v2", 8, 3),
        ("kimi-k2", 16, 8),  # no groups: only the number of experts bounds it
    ],
)
def test_the_bound_follows_from_groups_and_nodes(name, nodes, most) -> None:
    cfg = preset(name)
    assert most_nodes(cfg, evenly(cfg.n_routed_experts, nodes, nodes)) == most


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3))
def test_no_choice_of_the_gate_breaks_the_bound(seed, nodes, kept) -> None:
    rng = np.random.default_rng(seed)
    cfg = config(topk_group=kept, num_experts_per_tok=2)
    placement = by_rank(rng.integers(0, nodes, 8).tolist(), nodes, nodes)
    idx = gate.select(rng.standard_normal((20, 8)), cfg, Choices.named("hf"))
    check_nodes(dispatch(idx, placement), most_nodes(cfg, placement))


# Permutations.


def rows_of(plan, rank, key):
    """(token, k) of the rank's slots, sorted by a key of (source, token, k, local expert)."""
    found = []
    for t, row in enumerate(plan.idx.tolist()):
        for k, e in enumerate(row):
            if e in plan.placement.held[rank]:
                local = plan.placement.held[rank].index(e)
                found.append((key(int(plan.source[t]), t, k, local), t * len(row) + k, local))
    return sorted(found)


@given(plans())
def test_computed_rows_are_by_expert_then_source_then_token(plan) -> None:
    for rank in range(plan.placement.ranks):
        expected = rows_of(plan, rank, lambda s, t, k, e: (e, s, t, k))
        rows = permutation.computed(plan, rank)
        assert rows.slots.tolist() == [slot for _, slot, _ in expected]
        held = range(len(plan.placement.held[rank]))
        assert rows.parts.tolist() == [sum(e == local for *_, local in expected) for e in held]
        back = permutation.inverse(rows, plan.idx.size)
        assert [back[slot] for slot in rows.slots] == list(range(len(expected)))
        assert np.count_nonzero(back < 0) == plan.idx.size - len(expected)


@given(plans())
def test_an_all_to_all_of_what_is_sent_gives_what_arrives_and_sorted_chunks_what_is_computed(plan) -> None:
    """Megatron's chain: permute, all-to-all by splits, chunks (source, expert) to (expert, source)."""
    ranks = range(plan.placement.ranks)
    outgoing = []
    for rank in ranks:
        rows = permutation.sent(plan, rank)
        mine = [t for t in range(len(plan.idx)) if plan.source[t] == rank]
        expected = []
        for other in ranks:
            for e in plan.placement.held[other]:
                expected += [t * rows.chosen + k for t in mine for k in np.flatnonzero(plan.idx[t] == e)]
        assert rows.slots.tolist() == expected
        outgoing.append(rows.runs())
    for rank in ranks:
        rows = permutation.arrived(plan, rank)
        assert rows.slots.tolist() == [s for source in ranks for s in outgoing[source][rank].tolist()]
        held = len(plan.placement.held[rank])
        chunks = rows.runs()  # by source, then expert
        by_expert = [chunks[source * held + e] for e in range(held) for source in ranks]
        found = [slot for chunk in by_expert for slot in chunk.tolist()]
        assert found == permutation.computed(plan, rank).slots.tolist()


@given(plans())
def test_received_tokens_come_once_by_source_and_token_with_local_experts(plan) -> None:
    for rank in range(plan.placement.ranks):
        found = permutation.received(plan, rank)
        expected = sorted({(int(plan.source[t]), int(t)) for t in np.flatnonzero(plan.in_rank[:, rank])})
        assert found.tokens.tolist() == [t for _, t in expected]
        assert found.per_source.tolist() == [
            sum(s == source for s, _ in expected) for source in range(plan.placement.ranks)
        ]
        for n, (_, t) in enumerate(expected):
            for k, e in enumerate(plan.idx[t].tolist()):
                own = e in plan.placement.held[rank]
                assert found.experts[n, k] == (plan.placement.held[rank].index(e) if own else -1)
                assert found.slots[n, k] == (t * plan.idx.shape[1] + k if own else -1)
        assert sorted(found.slots[found.slots >= 0]) == sorted(permutation.computed(plan, rank).slots)


# Layouts.


def test_the_contiguous_layout_pads_every_expert_to_128_rows() -> None:
    experts = np.repeat([0, 2], [130, 128])
    rows = permutation.computed(dispatch(experts[:, None], evenly(3, 1)), 0)
    found = layouts.contiguous(rows)
    assert found.m_indices.tolist() == [0] * 130 + [-1] * 126 + [2] * 128
    assert found.slots.tolist() == [*range(130), *[-1] * 126, *range(130, 258)]


def test_the_masked_layout_has_counts_and_room_behind_them() -> None:
    found = layouts.masked(_rows([1, 0, 1]), 4)
    assert found.counts.tolist() == [1, 2]
    assert found.slots.tolist() == [[1, -1, -1, -1], [0, 2, -1, -1]]
    assert layouts.masked(_rows([1, 0, 1])).slots.shape == (2, 2)


def test_blocks_are_those_of_vllm_s_documentation() -> None:
    """topk_ids of four tokens over the experts 1 to 4 in blocks of 4; 12 stands for padding."""
    topk_ids = [[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]
    found = layouts.blocks(dispatch(topk_ids, evenly(5, 1)), 0, 4)
    assert found.sorted_token_ids.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert found.expert_ids.tolist() == [1, 2, 3, 4]
    assert found.num_tokens_post_padded == 16
    half = layouts.blocks(dispatch(topk_ids, Placement(((1, 0, 3), (4, 2)))), 1, 4)
    assert half.sorted_token_ids.tolist() == found.sorted_token_ids.tolist()
    assert half.expert_ids.tolist() == [-1, 1, -1, 0]


@given(plans(), st.integers(1, 5))
def test_layouts_and_back_give_every_slot_its_own_token(plan, alignment) -> None:
    """Filled on each rank, times the expert's number + 1, emptied: each slot has its own token times that."""
    tokens, chosen = plan.idx.shape
    x = np.arange(1.0, 2 * tokens + 1).reshape(tokens, 2)
    expected = (x[:, None] * (plan.idx[:, :, None] + 1)).reshape(tokens * chosen, 2)
    for kind in ("contiguous", "masked", "blocks"):
        slots = np.full((tokens * chosen, 2), np.nan)
        for rank, held in enumerate(plan.placement.held):
            rows, factor = permutation.computed(plan, rank), np.array([*held, -1]) + 1  # [-1] is padding's
            if kind == "contiguous":
                found = layouts.contiguous(rows, alignment)
                at, expert = found.slots, found.m_indices
                assert len(at) == sum(-(-n // alignment) * alignment for n in rows.parts)
            elif kind == "masked":
                found = layouts.masked(rows)
                at, expert = found.slots, np.where(found.slots < 0, -1, np.arange(len(held))[:, None])
                assert (np.count_nonzero(at >= 0, 1) == found.counts).all()
            else:
                found = layouts.blocks(plan, rank, alignment)
                expert = np.repeat(found.expert_ids, alignment)
                at = np.where(
                    (found.sorted_token_ids == plan.idx.size) | (expert < 0), -1, found.sorted_token_ids
                )
            out = layouts.filled(x, at, chosen)
            assert not out[at < 0].any()
            out = out * factor[expert][..., None]
            out[at < 0] = 1e9  # what stands in the padding does not come back
            layouts.emptied(out, at, slots)
        assert (slots == expected).all(), kind


# Traffic.


@given(plans())
def test_copies_are_those_of_loops(plan) -> None:
    at = plan.placement
    for t, row in enumerate(plan.idx.tolist()):
        own, owners = int(plan.source[t]), [int(at.rank[e]) for e in row]
        node = lambda rank: rank // at.ranks_per_node  # noqa: E731
        direct = [r for r in set(owners) if r != own]
        every = [r for r in owners if r != own]
        others = {node(r) for r in owners} - {node(own)}
        twins = {n * at.ranks_per_node + own % at.ranks_per_node for n in range(at.nodes)}
        expected = {
            "once per node": (len(others), len(set(owners) - twins)),
            "once per rank": (
                sum(node(r) != node(own) for r in direct),
                sum(node(r) == node(own) for r in direct),
            ),
            "once per expert": (
                sum(node(r) != node(own) for r in every),
                sum(node(r) == node(own) for r in every),
            ),
        }
        for name, way in traffic.WAYS.items():
            network, inside = way(plan).per_token
            assert (network[t], inside[t]) == expected[name], name
        network, inside = traffic.as_deepep_counts(plan).per_token
        assert (network[t], inside[t]) == (len({node(r) for r in owners}), len(set(owners)))


@given(plans())
def test_a_copy_saved_on_the_network_never_costs_more_than_the_copies_in_all(plan) -> None:
    node, rank, expert = (way(plan).total for way in traffic.WAYS.values())
    assert node[0] <= rank[0] <= expert[0]
    assert rank[1] <= node[1]
    assert sum(rank) <= sum(expert)


def test_a_row_of_v3_is_7392_bytes_out_and_14336_back() -> None:
    """One byte a channel and four for each of 56 tiles; a tile that is not full has a scale of its own."""
    assert traffic.fp8_row(7168) == 7168 + 56 * 4 == 7392
    assert traffic.bf16_row(7168) == 14336
    assert traffic.fp8_row(7168) / traffic.bf16_row(7168) == (1 + 4 / 128) / 2  # DeepEP's factor
    assert traffic.fp8_row(129) == 129 + 8


def test_3_2_experts_on_a_node_take_as_long_inside_as_one_copy_over_the_network() -> None:
    """The report's balance, on a token whose 13 experts are on 13 ranks of 4 other nodes, 3.25 on each."""
    assert traffic.INSIDE / traffic.NETWORK == 3.2
    placement = evenly(160, 160, 10)  # 16 ranks on each node
    ranks = [16 * node + i for node, count in ((1, 4), (2, 3), (3, 3), (4, 3)) for i in range(1, count + 1)]
    plan = dispatch([ranks], placement, [0])
    assert len(ranks) == 13
    network, inside = traffic.once_per_node(plan).total
    assert (network, inside) == (4, 13)
    slower = (inside / traffic.INSIDE) / (network / traffic.NETWORK)
    assert slower == pytest.approx(13 / 12.8)


def test_v3_s_routing_saves_most_of_the_network() -> None:
    """A token of experts on four nodes crosses the network 3.5 times: its own node is one of the eight."""
    plan = random_plan(4000)
    network, inside = traffic.once_per_node(plan).total
    assert network / 4000 == pytest.approx(plan.nodes_per_token.mean() * 7 / 8, rel=0.02)
    assert traffic.once_per_expert(plan).total[0] / 4000 == pytest.approx(7, rel=0.02)
    assert inside / traffic.INSIDE < network / traffic.NETWORK


@settings(max_examples=20)
@given(plans())
def test_a_plan_without_tokens_has_no_traffic(plan) -> None:
    none = replace(plan, idx=plan.idx[:0], source=plan.source[:0])
    assert all(way(none).total == (0, 0) for way in traffic.WAYS.values())
    assert not none.per_rank.any()
