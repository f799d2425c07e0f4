"""Numbers as text: against six bits at a time, taken by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bnmonitor.page import planes
from tests.page import made_documents as made

WORDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def test_the_highest_six_bits_of_all_come_first():
    words = np.array([0b000000_000001_000010_000000_000000_00, 0b111111_111110_000011_000000_000000_00], np.uint32)
    assert planes.packed(words) == "A/" + "B+" + "CD"


def test_the_lowest_two_bits_have_a_character_of_their_own():
    assert planes.packed(np.array([3], np.uint32)) == "AAAAAw"  # 110000, as base64 pads


@given(WORDS)
def test_numbers_come_out_as_they_went_in(words):
    words = np.array(words, dtype=np.uint32)
    text = planes.packed(words)
    np.testing.assert_array_equal(planes.unpacked(text, len(words)), words)
    whole = made.planes(words, 6)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"A"}


@given(WORDS)
def test_what_is_zero_in_all_of_them_at_the_end_takes_no_room(words):
    words = np.array(words, dtype=np.uint32) >> 20 << 20  # 12 bits are left
    assert len(planes.packed(words)) in {number * len(words) for number in range(3)}
    np.testing.assert_array_equal(planes.unpacked(planes.packed(words), len(words)), words)


@pytest.mark.parametrize(("text", "count"), [("AAA", 2), ("A", 0), ("Ä", 3)])
def test_a_text_of_another_number_of_numbers_is_refused(text, count):
    with pytest.raises(ValueError, match=r"damaged: [1-3] characters"):
        planes.unpacked(text, count)
