"""Positions and masks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refimpl.layers import batch

PACKED = np.array([[0, 0, 1, 1, 1, -1]])


def test_a_plain_sequence_is_causal() -> None:
    assert batch.allowed(np.zeros((1, 3), int))[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_packed_documents_do_not_see_each_other_and_padding_sees_itself() -> None:
    assert batch.allowed(PACKED)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_positions_count_from_zero_in_every_document() -> None:
    assert batch.positions(PACKED).tolist() == [[0, 1, 0, 1, 2, 0]]


def test_interleaved_documents_are_documents_too() -> None:
    segments = np.array([[5, 2, 5, 2, 5]])
    assert batch.positions(segments).tolist() == [[0, 0, 1, 1, 2]]
    assert batch.allowed(segments)[0, 0, 4].tolist() == [True, False, True, False, True]


segments = st.lists(st.integers(-1, 3), min_size=1, max_size=8)


@given(segments)
def test_mask_and_positions_are_what_their_sentences_say(row: list[int]) -> None:
    mask, places = batch.allowed(np.array([row]))[0, 0], batch.positions(np.array([row]))[0]
    for i, own in enumerate(row):
        assert mask[i].tolist() == [j == i or (j < i and row[j] == own) for j in range(len(row))]
        assert places[i] == row[:i].count(own)


@given(segments)
def test_every_query_has_a_key(row: list[int]) -> None:
    assert batch.allowed(np.array([row])).any(-1).all()


def test_heads_and_tokens_undo_each_other() -> None:
    x = np.arange(2 * 3 * 4 * 5.0).reshape(6, 4, 5)
    view = batch.Batch(2, 3, None, np.ones((1, 1, 3, 3), bool))
    assert view.heads(x).shape == (2, 4, 3, 5)
    assert (view.heads(x)[1, 2, 0] == x[3, 2]).all()  # second sequence, first token, head 2
    assert (view.tokens(view.heads(x)) == x).all()
