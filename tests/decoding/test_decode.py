"""New tokens from caches: against the whole forward pass, in chunks, pages and batches."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
from decoding.decoded import in_turns, turns_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    COMPLEX,
    RECORDINGS,
    V2,
    YARN,
    bits,
    config,
    model,
    one_sentence,
    random_ids,
    relative_error,
)

import refimpl
from refimpl.cases.bounds import Bounding
from refimpl.checkpoint.safetensors import open_file
from refimpl.decoding.decode import Decoder, Request
from refimpl.errors import Invalid
from refimpl.layers.context import Op
from refimpl.numerics import sites
from refimpl.numerics.floating import Floating
from refimpl.numerics.recipe import CARRIER
from refimpl.numerics.recipes import RECIPES

FORMS = ("naive", "absorbed")
AGREE = 1e-12  # relative, of logits of both forms in exact: 3e-15 is what is found


@st.composite
def configs(draw: Any) -> Any:
    """Small models of every kind: with a query latent or none, with YaRN or none, dense or with experts."""
    fields = {
        "q_lora_rank": draw(st.sampled_from([None, 7])),
        "rope_scaling": draw(st.sampled_from([None, YARN, YARN | {"mscale": 1.3}])),
        "rope_interleave": draw(st.booleans()),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "num_attention_heads": draw(st.integers(1, 3)),
        "kv_lora_rank": draw(st.integers(1, 9)),
        "qk_nope_head_dim": draw(st.integers(1, 5)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 6])),
        "v_head_dim": draw(st.integers(1, 7)),
        "max_position_embeddings": 200,
    }
    return config(**fields | draw(st.sampled_from([{}, V2])))


def sequences(cfg: Any, lengths: list[int], seed: int) -> list[np.ndarray]:
    return [random_ids(cfg, (n,), seed + i) for i, n in enumerate(lengths)]


def forwarded(m: refimpl.Model, ids: list[np.ndarray]) -> list[np.ndarray]:
    """The logits of every sequence, by one forward pass over the whole of it."""
    return [m.forward(own[None], trace=()).logits[0] for own in ids]


@settings(max_examples=50)
@given(configs(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 2**31), st.booleans())
def test_every_chunking_gives_the_bits_of_one_forward_pass(
    cfg: Any, lengths: list[int], seed: int, paged: bool
) -> None:
    """The naive form, in exact."""
    m, ids = model(cfg, seed, "exact"), sequences(cfg, lengths, seed)
    turns = turns_of(lengths, np.random.default_rng(seed))
    found = in_turns(Decoder(m, "naive", pages=len(ids) if paged else None), ids, turns)
    assert [bits(rows) for rows in found] == [bits(rows) for rows in forwarded(m, ids)]


@settings(max_examples=50)
@given(
    configs(),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([None, 1, 4]),
)
def test_the_absorbed_form_has_the_same_bits_for_every_chunking_and_agrees(
    cfg: Any, lengths: list[int], seed: int, paged: bool, split: int | None
) -> None:
    """Whatever the chunks, the pages and the company; with keys in parts as well."""
    m, ids = model(cfg, seed, "exact"), sequences(cfg, lengths, seed)
    turns = turns_of(lengths, np.random.default_rng(seed))
    found = in_turns(Decoder(m, "absorbed", pages=len(ids) if paged else None, split=split), ids, turns)
    alone = Decoder(m, "absorbed", split=split)
    once = [in_turns(alone, [own], [[len(own)]])[0] for own in ids]
    assert [bits(rows) for rows in found] == [bits(rows) for rows in once]
    for rows, whole in zip(found, forwarded(m, ids), strict=True):
        assert relative_error(rows, whole) <= AGREE


@pytest.mark.parametrize("form", FORMS)
def test_sequences_of_more_than_a_page_are_gathered(form: str) -> None:
    cfg = config(max_position_embeddings=200, num_hidden_layers=1)
    m, ids = model(cfg, precision="exact"), sequences(cfg, [70, 130], 1)
    turns = [[60, 1], [-1, 65], [5, 62], [5, 2]]
    paged = in_turns(Decoder(m, form, pages=5), ids, turns)
    plain = in_turns(Decoder(m, form), ids, turns)
    assert [bits(rows) for rows in paged] == [bits(rows) for rows in plain]
    for rows, whole in zip(paged, forwarded(m, ids), strict=True):
        assert bits(rows) == bits(whole) if form == "naive" else relative_error(rows, whole) <= AGREE


@pytest.mark.parametrize("split", [1, 3, 5, 100])
@pytest.mark.parametrize("form", FORMS)
def test_keys_in_parts_agree_and_one_part_is_the_whole_bit_for_bit(form: str, split: int) -> None:
    m = model(precision="exact")
    ids = sequences(m.config, [12, 5], 2)
    turns = [[7, 4], [4, 1], [1, 0]]
    found = in_turns(Decoder(m, form, split=split), ids, turns)
    whole = in_turns(Decoder(m, form), ids, turns)
    for own, other in zip(found, whole, strict=True):
        assert bits(own) == bits(other) if split > 12 else relative_error(own, other) <= AGREE


@pytest.mark.parametrize("name", RECIPES)
def test_in_every_recipe_the_naive_form_has_the_bits_of_the_forward_pass(name: str) -> None:
    """Tiles of activations in ready recipes are inside of a row, so that chunks change none."""
    m = model(precision=name)
    ids = sequences(m.config, [9, 6], 3)
    found = in_turns(Decoder(m, "naive", pages=2), ids, [[4, 6], [0, -1], [1, -1], [4, -1]])
    assert [bits(rows) for rows in found] == [bits(rows) for rows in forwarded(m, ids)]


@pytest.mark.parametrize("name", ["bf16", "official-inference"])
def test_in_a_recipe_chunks_change_no_bit_of_the_absorbed_form(name: str) -> None:
    m = model(precision=name)
    ids = sequences(m.config, [9, 6], 3)
    for split in (None, 2):
        decoder = Decoder(m, "absorbed", split=split)
        found, once = in_turns(decoder, ids, [[4, 6], [5, 0]]), in_turns(decoder, ids, [[9, 6]])
        assert [bits(rows) for rows in found] == [bits(rows) for rows in once]


# Agreement with the forward pass, relative, with its experts: three times what is found over several seeds.
OTHERS = {
    "float64": ("float64", 6e-14),
    "float32": ("float32", 4e-5),
    "complex": (COMPLEX, 6e-14),
    "bounds": (Bounding(), AGREE),
    "bf16": ("bf16", 0.2),
    "bf16 on float32": ("bf16@float32", 0.2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OTHERS)
def test_both_forms_run_in_every_arithmetic(name: str, form: str) -> None:
    precision, tolerance = OTHERS[name]
    m = model(precision=precision)
    ids = random_ids(m.config, (8,), 4)
    whole = m.forward(ids[None])
    chosen = whole.tensors["model.layers.1.mlp.gate.topk_idx"][0]
    for more in ({}, {"split": 3}, {"pages": 1}):
        decoder, rows = Decoder(m, form, **more), []
        cache = decoder.cache()
        for at in (slice(0, 3), slice(3, 4), slice(4, 8)):
            rows += decoder.forward([Request(cache, ids[at])], {1: np.asarray(chosen)[at]})
        found, want = (getattr(x, "plain", x) for x in (np.concatenate(rows), whole.logits[0]))
        assert relative_error(found, want) <= tolerance


@pytest.mark.parametrize("pages", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_rolled_back_and_gone_on_is_as_never_gone_there(form: str, pages: int | None) -> None:
    """What a rejected draft leaves: several tokens verified, some of them taken back."""
    m = model(precision="exact")
    decoder, ids, drafts = Decoder(m, form, pages=pages), random_ids(m.config, (9,), 5), [3, 1, 4]
    cache, other = decoder.cache(), decoder.cache()
    decoder.forward([Request(cache, ids[:4])])
    verified = decoder.forward([Request(cache, [ids[4], *drafts])])[0]
    cache.roll_back(5)
    after = decoder.forward([Request(cache, ids[5:])])[0]
    decoder.forward([Request(other, ids[:4])])
    assert bits(verified[:1]) == bits(decoder.forward([Request(other, ids[4:5])])[0])
    assert bits(after) == bits(decoder.forward([Request(other, ids[5:])])[0])
    for layer in decoder.kind.layers:
        assert bits(cache.rows(layer)) == bits(other.rows(layer))


def test_a_cache_that_one_form_filled_serves_the_other() -> None:
    m = model(precision="exact")
    ids = random_ids(m.config, (9,), 6)
    decoders = {form: Decoder(m, form) for form in FORMS}
    whole = forwarded(m, [ids])[0]
    for first, second in (FORMS, FORMS[::-1]):
        cache = decoders[first].cache()
        decoders[first].forward([Request(cache, ids[:6])])
        rows = decoders[second].forward([Request(cache, ids[6:])])[0]
        assert relative_error(rows, whole[6:]) <= AGREE


def test_a_cached_row_is_the_normalised_latent_and_the_rotated_shared_key() -> None:
    m = model(config(rope_scaling=YARN), precision="exact")
    ids = random_ids(m.config, (7,), 7)
    decoder = Decoder(m)
    cache = decoder.cache()
    in_turns(decoder, [ids], [[4], [3]], [cache])
    traced = m.forward(ids[None]).tensors
    rows = cache.rows(0)
    assert bits(rows[:, :5]) == bits(traced["model.layers.0.self_attn.kv_a_layernorm"][0])
    assert bits(rows[:, 5:]) == bits(traced["model.layers.0.self_attn.k_pe"][0, :, 0])


def test_named_tensors_are_those_of_the_forward_pass_by_new_token() -> None:
    m = model(precision="exact")
    ids = random_ids(m.config, (2, 6), 8)
    traced = m.forward(ids).tensors
    decoder = Decoder(m, "naive")
    caches = [decoder.cache() for _ in ids]
    decoder.forward([Request(cache, own[:n]) for cache, own, n in zip(caches, ids, (3, 5), strict=True)])
    step = decoder.run(
        [Request(cache, own[n:]) for cache, own, n in zip(caches, ids, (3, 5), strict=True)], trace="*"
    )
    assert "logits" in step.tensors
    assert "model.layers.1.mlp.gate.topk_idx" in step.tensors
    for name, array in step.tensors.items():
        want = traced[name]
        assert bits(array) == bits(np.concatenate([want[0, 3:], want[1, 5:]])), name
    assert [bits(x) for x in step.logits] == [bits(traced["logits"][0, 3:]), bits(traced["logits"][1, 5:])]
    assert [x.shape for x in step.hidden] == [(3, 12), (1, 12)]


def test_the_absorbed_form_names_its_query_and_its_sum_of_latents() -> None:
    m = model(precision="exact")
    ids, path = random_ids(m.config, (6,), 9), "model.layers.0.self_attn"
    decoder = Decoder(m)
    step = decoder.run([Request(decoder.cache(), ids)], trace=f"{path}.*")
    weight = m.weights[f"{path}.kv_b_proj.weight"].reshape(2, 4 + 3, 5)
    traced = m.forward(ids[None]).tensors
    q_nope = traced[f"{path}.q_b_proj"][0].reshape(6, 2, 10)[..., :4]
    query, latent = step.tensors[f"{path}.absorbed_query"], traced[f"{path}.kv_a_layernorm"][0]
    assert query == pytest.approx(np.einsum("thp,hpc->thc", q_nope, weight[:, :4]), rel=1e-12, abs=1e-14)
    mixed = np.einsum("hts,sc->thc", traced[f"{path}.probs"][0], latent)
    assert step.tensors[f"{path}.mixed_latent"] == pytest.approx(mixed, rel=1e-12, abs=1e-14)
    assert bits(step.tensors[f"{path}.q_pe"]) == bits(traced[f"{path}.q_pe"][0])
    assert all(name.startswith(path) for name in step.tensors)


def test_the_hidden_state_is_what_the_choice_says_a_module_reads() -> None:
    m = model(precision="exact")
    ids = random_ids(m.config, (6,), 9)
    traced = m.forward(ids[None]).tensors
    for chosen, name in (("after_norm", "model.norm"), ("before_norm", "model.layers.1")):
        own = model(precision="exact", choices=replace(m.choices, mtp_hidden=chosen))
        decoder = Decoder(own)
        hidden = decoder.run([Request(decoder.cache(), ids)]).hidden[0]
        assert relative_error(hidden, traced[name][0]) <= AGREE


# What DeepSeek's own code gave, prefilled and then token by token.
RECORDED = ("A01_v3_base", "A02_v3_noqlora_yarn")


@pytest.mark.parametrize("precision", ["exact", "float64"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RECORDED)
def test_logits_are_those_of_the_official_code(name: str, form: str, precision: str) -> None:
    folder = RECORDINGS / name
    ids = open_file(folder / "io.safetensors")["input_ids"]
    want = open_file(folder / "decode.safetensors")[f"official.{form.removesuffix('ed')}.decode_logits"]
    decoder = Decoder(refimpl.load(folder, precision), form, pages=4)
    length, steps = ids.shape[1], want.shape[1] - 1
    turns = [[length - steps] * 2, *[[1, 1]] * steps]
    found = in_turns(decoder, list(ids), turns)
    assert relative_error(np.stack(found)[:, -steps - 1 :], want) <= 1e-9


@pytest.mark.parametrize("precision", ["exact", "official-inference"])
def test_weights_that_are_stored_as_codes_are_read_as_in_the_forward_pass(precision: str) -> None:
    m = refimpl.load(RECORDINGS / "H01_fp8", precision)
    ids = random_ids(m.config, (8,), 1)
    whole = forwarded(m, [ids])[0]
    turns = [[3], [1], [4]]
    assert bits(in_turns(Decoder(m, "naive"), [ids], turns)[0]) == bits(whole)
    absorbed = in_turns(Decoder(m, "absorbed"), [ids], turns)[0]
    assert bits(absorbed) == bits(in_turns(Decoder(m, "absorbed"), [ids], [[8]])[0])
    assert precision != "exact" or relative_error(absorbed, whole) <= AGREE


def test_modules_that_look_ahead_are_left_out() -> None:
    """A model that is trained with MTP decodes with its main part."""
    cfg = config(num_nextn_predict_layers=1)
    m = model(cfg, precision="exact", training=refimpl.TrainingConfig())
    ids = random_ids(cfg, (7,), 1)
    assert m.modules == 1
    assert bits(in_turns(Decoder(m, "naive"), [ids], [[4], [3]])[0]) == bits(forwarded(m, [ids])[0])


class Sites(Floating):
    """float64, which notes the sites that values cross."""

    def __init__(self) -> None:
        super().__init__(np.float64)
        self.seen: set[str] = set()

    def at(self, site: str, x: np.ndarray) -> np.ndarray:
        self.seen.add(site)
        return x


def test_the_sites_of_decoding_are_crossed_and_all_are_listed() -> None:
    ar = Sites()
    m = model(precision=ar)
    for form in FORMS:
        in_turns(Decoder(m, form, split=3), [random_ids(m.config, (7,), 1)], [[4], [3]])
    assert set(sites.DECODING) <= ar.seen
    assert [s for s in ar.seen if not any(fnmatchcase(s, pattern) for pattern in sites.SITES)] == []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("site", ["cache.latent", "cache.k_pe", "attention.partial", "attention.lse"])
def test_ready_recipes_round_nothing_on_the_way_into_the_cache_or_between_parts(name: str, site: str) -> None:
    assert RECIPES[name].format(site) == CARRIER


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_chunk_gives_no_rows_and_changes_nothing(form: str) -> None:
    decoder = Decoder(model(precision="exact"), form, pages=3)
    one, two = decoder.cache(), decoder.cache()
    assert [rows.shape for rows in decoder.forward([Request(one, []), Request(two, [])])] == [(0, 29)] * 2
    rows = decoder.forward([Request(one, []), Request(two, [1, 2])])
    assert [x.shape for x in rows] == [(0, 29), (2, 29)]
    assert (one.length, two.length) == (0, 2)


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a context longer than the table": (
        lambda d, c: [Request(c, [1] * 60)],
        ("5 tokens and 60", "at most 64"),
    ),
    "an id outside": (lambda d, c: [Request(c, [1, 29])], ("request 0", "29 at 1", "[0, 29)")),
    "an id below": (lambda d, c: [Request(c, [-1])], ("request 0", "-1 at 0")),
    "no integers": (lambda d, c: [Request(c, [0.5])], ("request 0", "float64", "integers")),
    "two rows": (lambda d, c: [Request(c, [[1]])], ("request 0", "(1, 1)", "(n,)")),
    "ragged": (lambda d, c: [Request(c, [[1], [1, 2]])], ("request 0", "ragged")),
    "one cache twice": (lambda d, c: [Request(c, [1]), Request(c, [2])], ("request 1", "its own")),
    "another configuration": (
        lambda d, c: [Request(c, [1]), Request(Decoder(model(config(rope_theta=99.0))).cache(), [1])],
        ("request 1", "another configuration"),
    ),
    "another arithmetic": (
        lambda d, c: [Request(Decoder(model(precision="float32")).cache(), [1])],
        ("request 0", "arithmetic"),
    ),
    "no requests": (lambda d, c: [], ("no request", "at least 1")),
    "a pool that is full": (
        lambda d, c: [Request(c, [1]), *(Request(d.cache(), [1]) for _ in range(3))],
        ("0 free pages", "1 are needed"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_sentence_and_leave_the_caches(name: str) -> None:
    make, fragments = BAD[name]
    decoder = Decoder(model(), pages=3)
    cache = decoder.cache()
    decoder.forward([Request(cache, [1, 2, 3, 4, 5])])
    before = [bits(cache.rows(layer)) for layer in decoder.kind.layers]
    with pytest.raises(Invalid) as caught:
        decoder.forward(make(decoder, cache))
    one_sentence(caught, *fragments)
    assert decoder.pool is not None
    assert (cache.length, decoder.pool.free) == (5, 2)
    assert [bits(cache.rows(layer)) for layer in decoder.kind.layers] == before


def test_whatever_is_raised_in_the_network_leaves_the_caches() -> None:
    m = model(precision="exact")

    def broken(c: Any, x: Any) -> Any:
        raise KeyboardInterrupt

    decoder = Decoder(m, pages=2)
    cache, new = decoder.cache(), decoder.cache()
    decoder.forward([Request(cache, [1, 2, 3])])
    m.ops = replace(m.ops, head=Op(broken, broken))
    before = [bits(cache.rows(layer)) for layer in decoder.kind.layers]
    with pytest.raises(KeyboardInterrupt):
        decoder.forward([Request(cache, [4, 5]), Request(new, [1])])
    assert decoder.pool is not None
    assert (cache.length, new.length, decoder.pool.free) == (3, 0, 1)
    assert [bits(cache.rows(layer)) for layer in decoder.kind.layers] == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"form": "fused"}, "form is 'fused'"),
        ({"split": 0}, "split is 0"),
        ({"split": 1.5}, "split is 1.5"),
        ({"pages": 0}, "number of pages is 0"),
    ],
)
def test_a_decoder_refuses_what_it_cannot_be(arguments: dict[str, Any], fragment: str) -> None:
    with pytest.raises(Invalid) as caught:
        Decoder(model(), **arguments)
    one_sentence(caught, fragment)


def test_forced_experts_have_to_be_those_of_the_new_tokens() -> None:
    decoder = Decoder(model())
    with pytest.raises(Invalid) as caught:
        decoder.forward([Request(decoder.cache(), [1, 2])], {1: [[0, 1, 2]]})
    one_sentence(caught, "routing of layer 1", "(2, 3)")


def test_there_is_no_backward_pass() -> None:
    decoder = Decoder(model())
    with pytest.raises(AssertionError, match="no backward"):
        decoder._op.backward(None)
