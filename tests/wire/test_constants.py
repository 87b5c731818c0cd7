"""The specification's numbers, against a second list that was written from proto.md independently."""

from __future__ import annotations

from enum import IntEnum

import pytest

from nbdimg.wire import constants
from tests.support import rawprotocol


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (constants.Option, rawprotocol.Option),
        (constants.OptionReply, rawprotocol.Rep),
        (constants.Info, rawprotocol.Info),
        (constants.TransmissionFlag, rawprotocol.TransmissionFlag),
        (constants.Command, rawprotocol.Command),
        (constants.CommandFlag, rawprotocol.CommandFlag),
        (constants.Chunk, rawprotocol.ChunkType),
        (constants.NbdError, rawprotocol.NbdError),
    ],
)
def test_names_have_the_numbers_of_the_specification(ours: type[IntEnum], theirs: type[IntEnum]) -> None:
    assert {name: int(member) for name, member in ours.__members__.items()} == {
        name: int(member) for name, member in theirs.__members__.items()
    }


def test_magics_are_those_of_the_specification() -> None:
    assert constants.INIT_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert constants.OPTION_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"
    assert constants.OPTION_REPLY_MAGIC == 0x0003E889045565A9
    assert constants.REQUEST_MAGIC == 0x25609513
    assert constants.EXTENDED_REQUEST_MAGIC == 0x21E41C71
    assert constants.SIMPLE_REPLY_MAGIC == 0x67446698
    assert constants.STRUCTURED_REPLY_MAGIC == 0x668E33EF
    assert constants.EXTENDED_REPLY_MAGIC == 0x6E8A278C


def test_base_allocation_flags_are_hole_and_zero() -> None:
    assert (int(constants.Allocation.HOLE), int(constants.Allocation.ZERO)) == (1, 2)
    assert constants.BASE_ALLOCATION == "base:allocation"
    assert constants.ALLOCATION_DEPTH == "qemu:allocation-depth"
    assert constants.DIRTY_BITMAP == "qemu:dirty-bitmap:"
