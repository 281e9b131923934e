"""Messages are grouped by how they begin, in their order, in groups of limited size."""

from itertools import chain, groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flash_celery.capture.transactions import LONGEST_RUN, runs
from flash_celery.errors import ProtocolError

BEGINNINGS = [b"B", b"C", b"I\0\0\0\1", b"I\0\0\0\2", b"U\0\0\0\1"]
MESSAGES = st.lists(
    st.builds(
        lambda beginning, rest, times: [beginning + rest] * times,
        st.sampled_from(BEGINNINGS),
        st.binary(max_size=3),
        st.sampled_from([1, 2, LONGEST_RUN - 1, LONGEST_RUN + 1]),
    )
).map(lambda parts: list(chain.from_iterable(parts)))


@given(MESSAGES)
@example([b"I\0\0\0\1a", b"I\0\0\0\2", b"I\0\0\0\1b"])
@example([b"I\0\0\0\1"] * 3 * LONGEST_RUN)
def test_messages_that_begin_alike_are_grouped_in_their_order(messages):
    grouped = list(runs(messages))
    assert list(chain.from_iterable(run for _, run in grouped)) == messages
    for head, run in grouped:
        assert 0 < len(run) <= LONGEST_RUN
        assert {message[:5] for message in run} == {head}
    changes = sum(1 for _ in groupby(messages, lambda message: message[:5]))
    assert len(grouped) <= changes + len(messages) // LONGEST_RUN


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_message_is_refused(place):
    messages = [b"B", b"C"]
    messages.insert(place, b"")
    with pytest.raises(ProtocolError, match="empty"):
        list(runs(messages))
    with pytest.raises(ProtocolError, match="empty"):
        list(runs([b""]))
