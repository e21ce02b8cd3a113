"""The cache of weights: bounded, least recently used out first, safe in threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import support

from refimpl.checkpoint.weights import DictWeights
from refimpl.numerics.floating import Floating
from refimpl.parameters import CachedParameters

FLOAT64 = Floating(np.float64)
NAMES = [f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in range(4)]
SIZE = 6 * 12 * 8  # bytes of each of them as float64


class Counted(DictWeights):
    """Counts how often a tensor is read."""

    def __init__(self) -> None:
        config = support.config()
        super().__init__(config, support.random_weights(config, 1))
        self.read: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.append(name)
        return super().__getitem__(name)


def test_a_weight_is_read_once_while_there_is_room() -> None:
    weights = Counted()
    cache = CachedParameters(weights, FLOAT64)
    assert all(cache.weight(NAMES[0]) is cache.weight(NAMES[0]) for _ in range(3))
    assert weights.read == NAMES[:1]


def test_what_was_not_used_longest_goes_first() -> None:
    for use in (CachedParameters.weight, CachedParameters.array):
        weights = Counted()
        cache = CachedParameters(weights, FLOAT64, limit=2 * SIZE)
        for name in (NAMES[0], NAMES[1], NAMES[0], NAMES[2], NAMES[0]):
            use(cache, name)
        assert weights.read == NAMES[:3]
        use(cache, NAMES[1])
        assert weights.read == [*NAMES[:3], NAMES[1]]


def test_what_is_larger_than_the_cache_is_not_held() -> None:
    weights = Counted()
    cache = CachedParameters(weights, FLOAT64, limit=SIZE - 1)
    cache.array(NAMES[0])
    cache.array(NAMES[0])
    assert weights.read == [NAMES[0]] * 2


def test_threads_may_share_it() -> None:
    weights = Counted()
    cache = CachedParameters(weights, FLOAT64, limit=2 * SIZE)

    def work(n: int) -> bool:
        name = NAMES[n % len(NAMES)]
        return np.array_equal(cache.weight(name).value, weights._arrays[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(4000)))
    assert cache.held_bytes <= 2 * SIZE
