"""GO and EXPORT_NAME of an export that is made on entry: the answer waits, and nothing else differs."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from nbdimg.errors import ProtocolError
from nbdimg.wire.constants import OptionReply
from nbdimg.wire.handshake import Handshake, OptionError, State
from tests.support.rawprotocol import Option, Rep, info_data, meta_data, option_bytes
from tests.wire.haggling import ALLOCATION, DISK, PLAIN, Exports, ask, ask_type, begun, is_in_step, parsed

MADE = replace(PLAIN, name="made", is_made_on_entry=True)
GO_MADE = option_bytes(Option.GO, info_data("made", ()))
TOO_MANY = OptionError(OptionReply.ERR_POLICY, "there are too many")


def entering(option: bytes = GO_MADE, *, client_flags: int = 0b11) -> Handshake:
    handshake = begun(exports=Exports((DISK, MADE)), client_flags=client_flags)
    assert handshake.receive(option) == b""
    assert handshake.state is State.ENTERING
    assert handshake.entry is not None
    assert handshake.entry.export == MADE
    return handshake


def test_go_of_an_export_made_on_entry_is_answered_when_it_is_there_with_its_real_size() -> None:
    handshake = entering()
    replies = parsed(handshake.entered(replace(MADE, size=0x1234)))
    assert [reply.type for reply in replies] == [Rep.INFO, Rep.ACK]
    assert replies[0].data == struct.pack(">HQH", 0, 0x1234, 0x0003)
    assert handshake.state is State.DONE
    assert handshake.session is not None
    assert handshake.session.export.size == 0x1234


def test_info_and_contexts_of_an_export_made_on_entry_are_answered_at_once() -> None:
    handshake = begun(exports=Exports((DISK, MADE)))
    assert ask_type(handshake, Option.INFO, info_data("made")) == Rep.ACK
    assert ask_type(handshake, Option.STRUCTURED_REPLY) == Rep.ACK
    assert ask_type(handshake, Option.SET_META_CONTEXT, meta_data("made", (ALLOCATION,))) == Rep.ACK
    assert handshake.receive(GO_MADE) == b""
    handshake.entered(MADE)
    assert handshake.session is not None
    assert handshake.session.contexts == {1: ALLOCATION}


@pytest.mark.parametrize(("client_flags", "padding"), [(0b11, 0), (0b01, 124)])
def test_export_name_of_an_export_made_on_entry_is_answered_when_it_is_there(client_flags: int, padding: int) -> None:
    handshake = entering(option_bytes(Option.EXPORT_NAME, b"made"), client_flags=client_flags)
    assert handshake.entered(MADE) == struct.pack(">QH", MADE.size, 0x0003) + bytes(padding)
    assert handshake.state is State.DONE


@pytest.mark.parametrize("count", [1, 28])
def test_what_comes_while_entering_is_kept_for_transmission(count: int) -> None:
    handshake = entering()
    request = bytes(range(count))
    for at in range(count):
        assert handshake.receive(request[at : at + 1]) == b""
    assert handshake.state is State.ENTERING
    handshake.entered(MADE)
    assert handshake.leftover == request


def test_go_that_is_refused_after_all_goes_on_haggling() -> None:
    handshake = entering()
    (reply,) = parsed(handshake.refused(TOO_MANY))
    assert (reply.option, reply.type, reply.text) == (Option.GO, Rep.ERR_POLICY, "there are too many")
    assert is_in_step(handshake)
    assert ask(handshake, Option.GO, info_data("disk"))[-1].type == Rep.ACK


def test_go_that_is_refused_after_all_is_answered_before_options_that_came_meanwhile() -> None:
    handshake = entering()
    assert handshake.receive(option_bytes(0xABCD) + GO_MADE + option_bytes(Option.ABORT)) == b""
    replies = parsed(handshake.refused(TOO_MANY))
    assert [(reply.option, reply.type) for reply in replies] == [
        (Option.GO, Rep.ERR_POLICY),
        (0xABCD, Rep.ERR_UNSUP),
    ]
    assert handshake.state is State.ENTERING
    replies = parsed(handshake.refused(TOO_MANY))
    assert [(reply.option, reply.type) for reply in replies] == [
        (Option.GO, Rep.ERR_POLICY),
        (Option.ABORT, Rep.ACK),
    ]
    assert handshake.state.name == "CLOSED"


def test_export_name_that_is_refused_after_all_closes() -> None:
    handshake = entering(option_bytes(Option.EXPORT_NAME, b"made"))
    with pytest.raises(ProtocolError, match="EXPORT_NAME: there are too many"):
        handshake.refused(TOO_MANY)
