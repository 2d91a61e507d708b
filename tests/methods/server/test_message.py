"""Messages between a server and its workers: what is written is read, and what is not a message is not read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_sketch.methods.server.message import HEADER, Header, Kind, Note, Unreadable

PAYLOAD = torch.arange(100, dtype=torch.uint8)


@given(
    st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.integers(0, 255), st.sampled_from(Note), st.integers(0, 100)
)
def test_a_message_is_read_as_it_was_written(kind: Kind, number: int, code: int, note: Note, size: int) -> None:
    header = Header(kind, number, code, note)
    message = header.write(PAYLOAD[: size // 2], PAYLOAD[size // 2 : size])
    assert message.numel() == HEADER + size
    found, payload, intact = Header.read(message)
    assert found == header
    assert torch.equal(payload, PAYLOAD[:size])
    assert intact


@pytest.mark.parametrize("position", range(HEADER + 100))
def test_a_flipped_bit_is_noticed_wherever_it_is(position: int) -> None:
    message = Header(Kind.PUSH, 7, 2).write(PAYLOAD)
    message[position] ^= 1 << position % 8
    try:
        assert not Header.read(message)[2]
    except Unreadable:
        assert position < HEADER


@given(st.binary(max_size=64))
def test_bytes_of_a_stranger_are_read_or_unreadable(content: bytes) -> None:
    message = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)
    try:
        header, payload, _ = Header.read(message)
    except Unreadable:
        return
    assert header.kind in Kind
    assert payload.numel() == message.numel() - HEADER
