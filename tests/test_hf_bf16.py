"""The recipe `hf-bf16` against transformers in bfloat16, operation by operation.  SPEC RECIPE-12.

The whole run is `python bench/hf_bf16.py`; its table is bench/hf_bf16.md.  Group `crosscheck`.
"""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.crosscheck
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

BENCH = Path(__file__).parents[1] / "bench" / "hf_bf16.py"


@pytest.fixture(scope="module")
def bench():
    import sys

    spec = importlib.util.spec_from_file_location("hf_bf16", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hf_bf16"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["A02_v3_noqlora_yarn", "tiny-v3"])
def recorded(request, bench, tmp_path):
    preset = request.param == "tiny-v3"
    return bench.Recorded(bench.virtual(tmp_path) if preset else bench.RECORDED / request.param, seed=7)


def test_every_operation_is_equal_where_its_order_is_determined_and_else_within_its_bound(bench, recorded):
    for place, (elements, equal, within, determined) in bench.measured(recorded).items():
        assert (equal if determined else within) == elements, place


def test_whole_models_agree_with_routing_forced(bench, recorded):
    for routing, elements, equal, gap in bench.whole(recorded):
        assert routing == "free" or (equal > 0.8 * elements and gap < 2.0**-5)
