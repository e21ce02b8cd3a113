"""Caches: rows of tokens, one after another or in pages of a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXACT, FLOAT64, bits, config, one_sentence

from refimpl.decoding.cache import Cache, Contiguous, Kind
from refimpl.decoding.pages import MOST, PAGE, Pool
from refimpl.errors import Invalid

CFG = config(max_position_embeddings=400)
KIND = Kind.of(CFG, FLOAT64)
WIDTH = 5 + 6  # the latent, then the rotated key part
CACHES: dict[str, Callable[[], Cache]] = {
    "contiguous": lambda: Contiguous(KIND),
    "contiguous with room": lambda: Contiguous(KIND, 20),
    "paged": lambda: Pool(KIND, 7).cache(),
}
Rows = dict[int, np.ndarray]


def draw(n: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal((n, WIDTH)) for layer in KIND.layers}


def held(cache: Cache) -> list[bytes]:
    return [bits(cache.rows(layer)) for layer in KIND.layers]


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_rows_come_back_in_the_order_of_tokens_layer_by_layer(make: Callable[[], Cache]) -> None:
    cache, parts = make(), [draw(n, n) for n in (3, 0, 1, 150, 2)]
    for part in parts:
        cache.append(part)
    assert cache.length == 156
    for layer in KIND.layers:
        assert bits(cache.rows(layer)) == bits(np.concatenate([part[layer] for part in parts]))


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_rolled_back_and_appended_is_as_never_gone_there(make: Callable[[], Cache]) -> None:
    one, other, first, last = make(), make(), draw(70, 1), draw(9, 2)
    one.append(first)
    one.append(draw(200, 3))
    one.roll_back(70)
    assert (one.length, held(one)) == (70, [bits(first[layer]) for layer in KIND.layers])
    one.append(last)
    other.append(first)
    other.append(last)
    assert held(one) == held(other)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 140)), max_size=12))
def test_pages_hold_what_rows_one_after_another_hold(steps: list[tuple[int, bool, int]]) -> None:
    """Three sequences share a pool, grow and are rolled back; each is beside a cache of its own."""
    pool = Pool(KIND, 9)
    pairs = [(pool.cache(), Contiguous(KIND)) for _ in range(3)]
    for i, (which, back, n) in enumerate(steps):
        paged, plain = pairs[which]
        if back:
            for cache in (paged, plain):
                cache.roll_back(min(n, plain.length))
            continue
        n = min(n, KIND.limit - plain.length)
        if -(-(plain.length + n) // PAGE) - len(paged.table) > pool.free:
            with pytest.raises(Invalid) as caught:
                paged.append(draw(n, i))
            one_sentence(caught, "the pool has", "free pages")
            continue
        for cache in (paged, plain):
            cache.append(draw(n, i))
    for paged, plain in pairs:
        assert held(paged) == held(plain)
        assert len(paged.table) == -(-plain.length // PAGE)
    tables = [page for paged, _ in pairs for page in paged.table]
    assert len(set(tables)) == len(tables) == pool.size - pool.free


def test_the_free_page_of_lowest_number_comes_first() -> None:
    pool = Pool(KIND, 5)
    one, two = pool.cache(), pool.cache()
    one.append(draw(65))
    two.append(draw(64))
    one.roll_back(0)
    two.append(draw(100))
    assert (one.table, two.table, pool.free) == ((), (2, 0, 1), 2)


def test_the_rows_of_a_page_are_where_the_block_table_says() -> None:
    pool, rows = Pool(KIND, 4), draw(130)
    first = pool.cache()
    first.append(draw(1, 9))
    cache = pool.cache()
    cache.append(rows)
    assert cache.table == (1, 2, 3)
    for j in (0, 63, 64, 127, 128, 129):
        for layer in KIND.layers:
            at = pool.pages[layer][cache.table[j // 64], j % 64]
            assert bits(at) == bits(rows[layer][j])


def test_a_cache_is_opened_on_pages_that_are_filled_already() -> None:
    pool, rows = Pool(KIND, 4), draw(100)
    for layer in KIND.layers:
        pool.pages[layer][3] = rows[layer][:64]
        pool.pages[layer][1, :36] = rows[layer][64:]
    cache = pool.cache((3, 1), 100)
    assert held(cache) == [bits(rows[layer]) for layer in KIND.layers]
    cache.append(draw(60, 1))
    assert cache.table == (3, 1, 0)


def test_rows_are_numbers_of_the_arithmetic() -> None:
    cache = Contiguous(Kind.of(CFG, EXACT, (7,)))
    cache.append({7: np.ones((2, WIDTH), np.float32)})
    assert cache.rows(7).dtype == np.float64


BAD: dict[str, tuple[Callable[[Cache], Any], tuple[str, ...]]] = {
    "back past the start": (lambda c: c.roll_back(-1), ("roll back to is -1", "[0, 10]")),
    "back to what is not there": (lambda c: c.roll_back(11), ("roll back to is 11", "[0, 10]")),
    "back to a fraction": (lambda c: c.roll_back(2.5), ("2.5", "whole number")),  # type: ignore[arg-type]
    "back to a truth value": (lambda c: c.roll_back(True), ("True", "whole number")),
    "longer than the positions": (lambda c: c.append(draw(391)), ("10 tokens and 391 more", "at most 400")),
    "fewer than none": (lambda c: c.extend(-1), ("number of new tokens is -1", "at least 0")),
    "a layer missing": (lambda c: c.append({0: draw(1)[0]}), ("for layers [0]", "(0, 1)")),
    "another width": (
        lambda c: c.append({layer: x[:, 1:] for layer, x in draw(2).items()}),
        ("layer 0", "(2, 10)", "(n, 11)"),
    ),
    "layers of different lengths": (
        lambda c: c.append(draw(2) | {1: draw(3)[1]}),
        ("layer 0", "(2, 11)", "one n for all layers"),
    ),
    "no numbers": (lambda c: c.append(draw(2) | {1: np.full((2, WIDTH), np.nan)}), ("layer 1", "finite")),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_the_cache(name: str, make: Callable[[], Cache]) -> None:
    call, fragments = BAD[name]
    cache = make()
    cache.append(draw(10))
    before = held(cache)
    with pytest.raises(Invalid) as caught:
        call(cache)
    one_sentence(caught, *fragments)
    assert (cache.length, held(cache)) == (10, before)


POOLS: dict[str, tuple[Callable[[Pool], Any], tuple[str, ...]]] = {
    "outside": (lambda p: p.cache((4, 2), 65), ("names page 4", "[0, 4)")),
    "before the first": (lambda p: p.cache((-1,), 3), ("names page -1", "[0, 4)")),
    "of another sequence": (lambda p: p.cache((0,), 3), ("names page 0", "in use")),
    "twice": (lambda p: p.cache((2, 2), 65), ("names page 2", "in use")),
    "too few": (lambda p: p.cache((2,), 65), ("has 1 pages", "2 for 65 tokens in pages of 64")),
    "too many": (lambda p: p.cache((2, 1), 64), ("has 2 pages", "1 for 64 tokens in pages of 64")),
    "no number": (lambda p: p.cache((1.0,), 64), ("1.0", "whole number")),  # type: ignore[arg-type]
    "too long": (lambda p: p.cache((), 401), ("401", "at most 400")),
    "more than there are": (lambda p: p.cache().append(draw(200)), ("has 3 free pages", "4 are needed")),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_bad_block_table_is_one_sentence_and_leaves_the_pool(name: str) -> None:
    call, fragments = POOLS[name]
    pool = Pool(KIND, 4)
    cache = pool.cache()
    cache.append(draw(10))
    before = held(cache)
    with pytest.raises(Invalid) as caught:
        call(pool)
    one_sentence(caught, *fragments)
    assert (cache.table, held(cache), pool.free) == ((0,), before, 3)


@pytest.mark.parametrize("pages", [0, -1, MOST + 1, 2.0, True])
def test_a_pool_has_a_bounded_number_of_pages(pages: Any) -> None:
    with pytest.raises(Invalid) as caught:
        Pool(KIND, pages)
    one_sentence(caught, "the number of pages")


@pytest.mark.parametrize("room", [-1, 401, "many"])
def test_room_is_bounded_by_the_positions(room: Any) -> None:
    with pytest.raises(Invalid) as caught:
        Contiguous(KIND, room)
    one_sentence(caught)
