"""A named implementation runs or is refused."""

import pytest

from jax_sae.ops.dispatch import resolve

IMPLEMENTATIONS = {"fast": 1, "plain": 2}


def test_a_name_is_taken_at_its_word():
    assert resolve("fast", IMPLEMENTATIONS, default="plain") == 1
    assert resolve("plain", IMPLEMENTATIONS, default="fast") == 2


def test_none_is_the_default():
    assert resolve(None, IMPLEMENTATIONS, default="plain") == 2


@pytest.mark.parametrize("name", ["Fast", "", "pallas"])
def test_other_names_are_refused_and_the_message_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"implementation is '{name}'; expected None or one of fast, plain"):
        resolve(name, IMPLEMENTATIONS, default="plain")
