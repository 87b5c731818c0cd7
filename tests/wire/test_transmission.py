"""Receiver: from bytes to requests.

    compact request   magic u32, flags u16, type u16, cookie u64, offset u64, length u32      28 bytes
    extended request  magic u32, flags u16, type u16, cookie u64, offset u64, length u64      32 bytes

Spec: proto.md "Request message"; branch extension-ext-header. The invariants (R1) to (R4) are the receiver's own.
"""

from __future__ import annotations

import random
import struct

import pytest

from nbdimg.errors import ProtocolError
from nbdimg.limits import Limits
from nbdimg.wire.transmission import CARRIED_SHARE, CONTEXT_IDS_MAX
from tests.wire.receiving import PAYLOAD_MAX, SCRATCH_SIZE, SPILL_SIZE, Owner, Seen

SEED = 20

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
WITHOUT_PAYLOAD = (READ, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE, 9, 0xFFFF)
FUA, PAYLOAD_LEN = 0x01, 0x20

DIALECTS = pytest.mark.parametrize("is_extended", [False, True], ids=["compact", "extended"])


def compact(
    command: int, length: int, payload: bytes = b"", *, flags: int = 0, cookie: int = 7, offset: int = 0
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def extended(
    command: int, length: int, payload: bytes = b"", *, flags: int = 0, cookie: int = 7, offset: int = 0
) -> bytes:
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload


def write(payload: bytes, is_extended: bool, cookie: int = 7) -> bytes:
    if is_extended:
        return extended(WRITE, len(payload), payload, flags=PAYLOAD_LEN, cookie=cookie)
    return compact(WRITE, len(payload), payload, cookie=cookie)


def read(is_extended: bool, cookie: int = 8) -> bytes:
    return (extended if is_extended else compact)(READ, 4096, cookie=cookie)


def written(payload: bytes, cookie: int = 7) -> Seen:
    return Seen(WRITE, 0, cookie, 0, len(payload), payload)


def was_read(cookie: int = 8) -> Seen:
    return Seen(READ, 0, cookie, 0, 4096)


def content(length: int) -> bytes:
    """Bytes that differ from their neighbours."""
    return bytes(index * 7 % 251 for index in range(length))


# Layout


def test_compact_request_has_the_layout_of_the_specification() -> None:
    owner = Owner()
    owner.deliver(bytes.fromhex("25609513 0005 0006 0102030405060708 1112131415161718 f1f2f3f4"))
    assert owner.seen == [Seen(6, 5, 0x0102030405060708, 0x1112131415161718, 0xF1F2F3F4)]


def test_extended_request_has_the_layout_of_the_specification() -> None:
    owner = Owner(is_extended=True)
    owner.deliver(bytes.fromhex("21e41c71 0011 0006 0102030405060708 1112131415161718 f1f2f3f4f5f6f7f8"))
    assert owner.seen == [Seen(6, 0x11, 0x0102030405060708, 0x1112131415161718, 0xF1F2F3F4F5F6F7F8)]


def test_compact_write_is_followed_by_its_payload() -> None:
    owner = Owner()
    owner.deliver(bytes.fromhex("25609513 0001 0001 00000000000000ff 0000000000001000 00000003") + b"abc")
    assert owner.seen == [Seen(1, 1, 0xFF, 0x1000, 3, b"abc")]


def test_extended_write_is_followed_by_its_payload_and_loses_payload_len() -> None:
    owner = Owner(is_extended=True)
    owner.deliver(bytes.fromhex("21e41c71 0021 0001 00000000000000ff 0000000000001000 0000000000000003") + b"abc")
    assert owner.seen == [Seen(1, 1, 0xFF, 0x1000, 3, b"abc")]


# Streams


def random_stream(generator: random.Random, is_extended: bool) -> tuple[bytes, list[Seen]]:
    """A session's bytes, and the requests that they mean."""
    stream = b""
    meant = []
    for cookie in range(40):
        offset = generator.getrandbits(64)
        flags = generator.choice([0, FUA])
        kind = generator.choice(["plain", "write", "write", "status", "stray"])
        if kind == "write":
            payload = generator.randbytes(generator.choice([0, 1, 27, 64, 200, 224, 228, 229, 256, 700, PAYLOAD_MAX]))
            sent_flags = flags | (PAYLOAD_LEN if is_extended else 0)
            build = extended if is_extended else compact
            stream += build(WRITE, len(payload), payload, flags=sent_flags, cookie=cookie, offset=offset)
            meant.append(Seen(WRITE, flags, cookie, offset, len(payload), payload))
        elif kind == "status" and is_extended:
            ids = tuple(generator.getrandbits(32) for _ in range(generator.randrange(100)))
            length = generator.getrandbits(64)
            payload = struct.pack(f">Q{len(ids)}I", length, *ids)
            sent_flags = flags | PAYLOAD_LEN
            stream += extended(BLOCK_STATUS, len(payload), payload, flags=sent_flags, cookie=cookie, offset=offset)
            meant.append(Seen(BLOCK_STATUS, sent_flags, cookie, offset, length, payload, ids))
        elif kind == "stray" and is_extended:
            payload = generator.randbytes(generator.randrange(300))
            command = generator.choice([command for command in WITHOUT_PAYLOAD if command != BLOCK_STATUS])
            sent_flags = flags | PAYLOAD_LEN
            stream += extended(command, len(payload), payload, flags=sent_flags, cookie=cookie, offset=offset)
            meant.append(Seen(command, sent_flags, cookie, offset, len(payload), payload, is_refused=True))
        else:
            command = generator.choice(WITHOUT_PAYLOAD)
            length = generator.getrandbits(64 if is_extended else 32)
            stream += (extended if is_extended else compact)(command, length, flags=flags, cookie=cookie, offset=offset)
            meant.append(Seen(command, flags, cookie, offset, length))
    return stream, meant


def split(stream: bytes, generator: random.Random) -> list[bytes]:
    count = generator.randrange(1, min(60, len(stream)))
    cuts = sorted(generator.sample(range(1, len(stream)), count))
    return [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@DIALECTS
@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_stream_gives_the_same_requests_however_it_arrives(seed: int, is_extended: bool) -> None:
    """Whole, one byte at a time, split anywhere, with a turn's budget of requests, with room refused at times."""
    generator = random.Random(seed)
    stream, meant = random_stream(generator, is_extended)
    whole = Owner(is_extended=is_extended)
    whole.deliver(stream)
    assert whole.seen == meant
    bytewise = Owner(is_extended=is_extended)
    bytewise.deliver_in(bytes([byte]) for byte in stream)
    assert bytewise.seen == meant
    for _ in range(8):
        pieces = split(stream, generator)
        for turn_requests in (1_000_000, 3, 1):
            owner = Owner(is_extended=is_extended, turn_requests=turn_requests)
            owner.deliver_in(pieces)
            assert owner.seen == meant
        grants = [generator.random() < 0.4 for _ in range(60)]
        starved = Owner(is_extended=is_extended, turn_requests=generator.choice([1, 4, 100]), grants=grants)
        starved.deliver_in(pieces)
        assert starved.seen == meant
        assert not starved.receiver.starved
        assert not starved.receiver.is_mid_request()


@DIALECTS
def test_stream_in_a_buffer_barely_larger_than_a_header_is_understood(is_extended: bool) -> None:
    stream, meant = random_stream(random.Random(SEED), is_extended)
    owner = Owner(is_extended=is_extended, scratch_size=33, spill_size=1)
    owner.deliver(stream)
    assert owner.seen == meant


# A payload and the buffer's edge


@DIALECTS
@pytest.mark.parametrize("difference", range(-3, 4))
def test_write_that_ends_at_the_buffers_edge_is_whole(is_extended: bool, difference: int) -> None:
    payload = content(SCRATCH_SIZE - (32 if is_extended else 28) + difference)
    owner = Owner(is_extended=is_extended)
    owner.deliver(write(payload, is_extended) + read(is_extended))
    assert owner.seen == [written(payload), was_read()]
    assert owner.allocated == ([len(payload)] if difference > 0 else [])


@DIALECTS
@pytest.mark.parametrize("length", [SCRATCH_SIZE, SCRATCH_SIZE + 1, 2 * SCRATCH_SIZE, PAYLOAD_MAX])
@pytest.mark.parametrize("turn_requests", [1, 1_000_000])
def test_write_larger_than_the_buffer_is_whole(is_extended: bool, length: int, turn_requests: int) -> None:
    owner = Owner(is_extended=is_extended, turn_requests=turn_requests)
    owner.deliver(read(is_extended, 1) + write(content(length), is_extended) + read(is_extended))
    assert owner.seen == [was_read(1), written(content(length)), was_read()]
    assert owner.allocated == [length]


@DIALECTS
@pytest.mark.parametrize("arrived", [0, 1, 100, 299])
@pytest.mark.parametrize("behind", [0, 1, 27, 28, 31, 32, 33, SPILL_SIZE])
def test_payload_is_received_in_place_with_the_next_header_in_the_spill(
    is_extended: bool, arrived: int, behind: int
) -> None:
    owner = Owner(is_extended=is_extended, scratch_size=512)
    stream = write(content(300), is_extended) + read(is_extended) * 3
    start = (32 if is_extended else 28) + arrived
    owner.deliver(stream[:start])
    assert owner.seen == []
    views = owner.receiver.buffers()
    assert [len(view) for view in views] == [300 - arrived, SPILL_SIZE]
    stop = start + 300 - arrived + behind
    owner.deliver(stream[start:stop])
    assert owner.seen[:1] == [written(content(300))]
    owner.deliver(stream[stop:])
    assert owner.seen == [written(content(300)), was_read(), was_read(), was_read()]


@DIALECTS
@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_short_payload_that_comes_in_parts_is_carried_and_needs_no_buffer(is_extended: bool, difference: int) -> None:
    payload = content(1024 // CARRIED_SHARE + difference)
    stream = write(payload, is_extended) + read(is_extended)
    header_size = 32 if is_extended else 28
    for cut in range(header_size, header_size + len(payload)):
        owner = Owner(is_extended=is_extended, scratch_size=1024)
        owner.deliver(read(is_extended, 1) + stream[:cut])
        assert owner.seen == [was_read(1)]
        assert owner.receiver.is_mid_request()
        owner.deliver(stream[cut:])
        assert owner.seen == [was_read(1), written(payload), was_read()]
        assert not owner.receiver.is_mid_request()
        assert owner.allocated == ([len(payload)] if difference > 0 else [])


@DIALECTS
def test_payload_is_not_returned_before_its_last_byte(is_extended: bool) -> None:
    """(R3) Half a WRITE changes nothing."""
    owner = Owner(is_extended=is_extended)
    message = write(content(600), is_extended)
    for byte in message[:-1]:
        owner.deliver(bytes([byte]))
        assert owner.seen == []
        assert owner.receiver.is_mid_request()
    owner.deliver(message[-1:])
    assert owner.seen == [written(content(600))]
    assert not owner.receiver.is_mid_request()


@DIALECTS
def test_write_of_no_bytes_has_an_empty_payload(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended)
    owner.deliver(write(b"", is_extended) + read(is_extended))
    assert owner.seen == [written(b""), was_read()]


@DIALECTS
def test_payload_that_is_owned_outlives_the_shared_buffer(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended)
    owner.deliver(write(content(500), is_extended) + read(is_extended))
    request = owner.requests[0]
    assert request.owns_payload
    assert bytes(request.payload or b"") == content(500)


@DIALECTS
def test_payload_in_the_shared_buffer_is_lost_unless_it_is_kept(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended, turn_requests=1)
    receiver = owner.receiver
    message = write(content(50), is_extended) + write(content(60), is_extended)
    receiver.buffers()[0][: len(message)] = message
    receiver.received(len(message))
    kept, lost = receiver.next_request(), receiver.next_request()
    assert kept is not None
    assert lost is not None
    kept.keep_payload()
    owner.park()
    assert kept.owns_payload
    assert bytes(kept.payload or b"") == content(50)
    assert not lost.owns_payload
    assert bytes(lost.payload or b"") != content(60)


# No room


@DIALECTS
@pytest.mark.parametrize("arrived", [0, 1, 150])
def test_refused_buffer_starves_the_receiver_until_it_is_granted(is_extended: bool, arrived: int) -> None:
    message = write(content(400), is_extended)
    stop = (32 if is_extended else 28) + arrived
    owner = Owner(is_extended=is_extended, grants=[False, False])
    receiver = owner.receiver
    receiver.buffers()[0][:stop] = message[:stop]
    receiver.received(stop)
    for _ in range(2):
        assert receiver.next_request() is None
        assert receiver.starved
        owner.park()
        assert receiver.is_mid_request()
        receiver.resume()
    assert receiver.next_request() is None
    assert not receiver.starved
    owner.park()
    assert owner.refused == [400, 400]
    assert owner.allocated == [400]
    owner.deliver(message[stop:] + read(is_extended))
    assert owner.seen == [written(content(400)), was_read()]


@DIALECTS
def test_starved_receiver_returns_what_lies_before_the_payload_first(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended, grants=[False])
    receiver = owner.receiver
    stream = read(is_extended, 1) + write(content(5), is_extended, 2) + write(content(400), is_extended, 3)
    receiver.buffers()[0][:200] = stream[:200]
    receiver.received(200)
    cookies = [request.cookie for request in iter(receiver.next_request, None) if request is not None]
    assert cookies == [1, 2]
    assert receiver.starved
    owner.park()
    owner.continue_turn()
    owner.deliver(stream[200:])
    assert owner.seen == [written(content(400), 3)]


def test_starved_receiver_with_a_full_buffer_needs_no_new_byte_to_go_on() -> None:
    owner = Owner(grants=[False])
    receiver = owner.receiver
    message = write(content(400), False)
    receiver.buffers()[0][:] = message[:SCRATCH_SIZE]
    receiver.received(SCRATCH_SIZE)
    assert receiver.next_request() is None
    owner.park()
    owner.continue_turn()
    assert not receiver.starved
    owner.deliver(message[SCRATCH_SIZE:])
    assert owner.seen == [written(content(400))]


# Park and resume


@DIALECTS
def test_park_and_resume_at_every_byte_change_nothing(is_extended: bool) -> None:
    stream = read(is_extended, 1) + write(content(300), is_extended, 2) + write(content(9), is_extended, 3)
    meant = [was_read(1), written(content(300), 2), written(content(9), 3)]
    for cut in range(len(stream) + 1):
        owner = Owner(is_extended=is_extended)
        owner.deliver(stream[:cut])
        for _ in range(3):
            owner.continue_turn()
        owner.deliver(stream[cut:])
        owner.continue_turn()
        assert owner.seen == meant, cut


@DIALECTS
def test_park_with_a_whole_payload_not_yet_taken_keeps_it_and_the_spill(is_extended: bool) -> None:
    """A turn may end before it begins: the connection had no budget left."""
    owner = Owner(is_extended=is_extended)
    message = write(content(300), is_extended)
    owner.deliver(message[:100])
    receiver = owner.receiver
    rest = message[100:]
    payload_view, spill_view = receiver.buffers()
    payload_view[:] = rest
    following = read(is_extended)
    spill_view[: len(following)] = following
    receiver.received(len(rest) + len(following))
    owner.park()
    assert receiver.is_mid_request()
    owner.continue_turn()
    assert owner.seen == [written(content(300)), was_read()]


@DIALECTS
def test_is_mid_request_tells_whether_the_client_owes_bytes(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended)
    assert not owner.receiver.is_mid_request()
    owner.deliver(read(is_extended))
    assert not owner.receiver.is_mid_request()
    owner.deliver(read(is_extended)[:1])
    assert owner.receiver.is_mid_request()
    owner.deliver(read(is_extended)[1:])
    assert not owner.receiver.is_mid_request()


# Bytes behind the handshake


@DIALECTS
@pytest.mark.parametrize("cut", [1, 28, 60, 100, 168])
def test_feed_puts_bytes_in_front_of_what_comes(is_extended: bool, cut: int) -> None:
    stream = read(is_extended, 1) + write(content(80), is_extended, 2) + read(is_extended, 3)
    owner = Owner(is_extended=is_extended)
    owner.receiver.feed(stream[:cut])
    owner.continue_turn()
    owner.deliver(stream[cut:])
    assert owner.seen == [was_read(1), written(content(80), 2), was_read(3)]


def test_abandoned_receiver_keeps_nothing_of_what_has_come() -> None:
    owner = Owner()
    owner.receiver.feed(read(False) * 9)
    assert owner.receiver.is_mid_request()
    assert owner.receiver.abandon() is None
    assert not owner.receiver.carried
    assert not owner.receiver.is_mid_request()


def test_feed_fills_the_buffer_and_not_more() -> None:
    Owner().receiver.feed(bytes(SCRATCH_SIZE))
    with pytest.raises(ProtocolError, match=str(SCRATCH_SIZE + 1)):
        Owner().receiver.feed(bytes(SCRATCH_SIZE + 1))


# PAYLOAD_LEN


@pytest.mark.parametrize("command", [command for command in WITHOUT_PAYLOAD if command != BLOCK_STATUS])
@pytest.mark.parametrize("length", [0, 1, 8, 12, 500])
def test_payload_of_a_command_that_takes_none_is_consumed_and_refused(command: int, length: int) -> None:
    owner = Owner(is_extended=True)
    lookalike = (read(True, 99) * 20)[:length]
    owner.deliver(extended(command, length, lookalike, flags=PAYLOAD_LEN) + read(True))
    assert owner.seen == [Seen(command, PAYLOAD_LEN, 7, 0, length, lookalike, is_refused=True), was_read()]


@pytest.mark.parametrize("command", WITHOUT_PAYLOAD)
def test_payload_len_means_nothing_without_extended_headers(command: int) -> None:
    owner = Owner()
    owner.deliver(compact(command, 512, flags=PAYLOAD_LEN) + read(False))
    assert owner.seen == [Seen(command, PAYLOAD_LEN, 7, 0, 512), was_read()]


def test_payload_len_on_a_compact_write_stays_for_the_check_of_flags() -> None:
    owner = Owner()
    owner.deliver(compact(WRITE, 3, b"abc", flags=PAYLOAD_LEN))
    assert owner.seen == [Seen(WRITE, PAYLOAD_LEN, 7, 0, 3, b"abc")]


def test_extended_write_without_payload_len_still_has_its_payload() -> None:
    """Not compliant, and QEMU tolerates it; to take the payload for requests would be worse."""
    owner = Owner(is_extended=True)
    owner.deliver(extended(WRITE, 3, b"abc") + read(True))
    assert owner.seen == [written(b"abc"), was_read()]


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 32, (1 << 64) - 1])
def test_extended_length_without_payload_may_be_64_bits(command: int, length: int) -> None:
    owner = Owner(is_extended=True)
    owner.deliver(extended(command, length))
    assert owner.seen == [Seen(command, 0, 7, 0, length)]
    assert owner.allocated == []


@pytest.mark.parametrize("ids", [(), (1,), (1, 2, 3), (5, 5), (0, 0xFFFFFFFF)], ids=str)
def test_block_status_payload_gives_length_and_context_ids(ids: tuple[int, ...]) -> None:
    payload = struct.pack(">Q", 1 << 40) + b"".join(struct.pack(">I", each) for each in ids)
    owner = Owner(is_extended=True)
    owner.deliver(extended(BLOCK_STATUS, len(payload), payload, flags=PAYLOAD_LEN, offset=512) + read(True))
    assert owner.seen[0] == Seen(BLOCK_STATUS, PAYLOAD_LEN, 7, 512, 1 << 40, payload, ids)
    assert owner.seen[1:] == [was_read()]


@pytest.mark.parametrize("length", [0, 1, 4, 7, 9, 10, 11, 13, 23])
def test_block_status_payload_of_a_wrong_length_is_consumed_and_refused(length: int) -> None:
    owner = Owner(is_extended=True)
    owner.deliver(extended(BLOCK_STATUS, length, content(length), flags=PAYLOAD_LEN) + read(True))
    assert owner.seen[0].is_refused
    assert owner.seen[0].contexts is None
    assert owner.seen[1:] == [was_read()]


def test_block_status_payload_of_the_most_ids_is_taken_and_one_more_refused() -> None:
    for count, is_refused in ((CONTEXT_IDS_MAX, False), (CONTEXT_IDS_MAX + 1, True)):
        payload = bytes(8 + 4 * count)
        owner = Owner(is_extended=True, payload_max=1 << 16)
        owner.deliver(extended(BLOCK_STATUS, len(payload), payload, flags=PAYLOAD_LEN) + read(True))
        assert owner.seen[0].is_refused is is_refused
        assert owner.seen[1:] == [was_read()]


# The end of a stream


@DIALECTS
def test_payload_at_the_limit_is_taken_and_one_byte_more_ends_the_stream(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended)
    owner.deliver(write(content(PAYLOAD_MAX), is_extended))
    assert owner.seen == [written(content(PAYLOAD_MAX))]
    header_size = 32 if is_extended else 28
    with pytest.raises(ProtocolError, match=f"{PAYLOAD_MAX + 1} bytes, allowed {PAYLOAD_MAX}"):
        owner.deliver(write(content(PAYLOAD_MAX + 1), is_extended)[:header_size])
    assert owner.allocated == [PAYLOAD_MAX]


def test_payload_limit_holds_for_a_payload_that_lies_whole_in_the_buffer() -> None:
    owner = Owner(payload_max=10)
    with pytest.raises(ProtocolError):
        owner.deliver(write(content(11), False))
    assert owner.seen == []


def test_payload_limit_is_64_mib() -> None:
    assert Limits().payload_size == 64 << 20


@pytest.mark.parametrize("command", WITHOUT_PAYLOAD)
@pytest.mark.parametrize("length", [PAYLOAD_MAX + 1, 1 << 32, (1 << 64) - 1])
def test_stray_payload_beyond_the_limit_ends_the_stream(command: int, length: int) -> None:
    owner = Owner(is_extended=True)
    with pytest.raises(ProtocolError):
        owner.deliver(extended(command, length, flags=PAYLOAD_LEN))
    assert owner.allocated == []


@DIALECTS
@pytest.mark.parametrize("length", [1 << 31, 0xFFFFFFFF])
def test_write_of_a_huge_length_ends_the_stream_without_an_allocation(is_extended: bool, length: int) -> None:
    owner = Owner(is_extended=is_extended)
    with pytest.raises(ProtocolError):
        owner.deliver((extended if is_extended else compact)(WRITE, length, flags=FUA))
    assert owner.allocated == []


@DIALECTS
@pytest.mark.parametrize("bit", range(32))
def test_request_magic_with_one_wrong_bit_ends_the_stream(is_extended: bool, bit: int) -> None:
    message = bytearray(read(is_extended))
    message[bit // 8] ^= 1 << bit % 8
    owner = Owner(is_extended=is_extended)
    with pytest.raises(ProtocolError, match="magic"):
        owner.deliver(bytes(message))
    assert owner.seen == []


@DIALECTS
@pytest.mark.parametrize("magic", [0, 0x12560953, 0x96744668, 0x25609514, 0x67446698, 0x49484156])
def test_request_magic_of_another_message_ends_the_stream(is_extended: bool, magic: int) -> None:
    owner = Owner(is_extended=is_extended)
    with pytest.raises(ProtocolError):
        owner.deliver(struct.pack(">I", magic) + read(is_extended)[4:])


def test_request_of_the_other_dialect_ends_the_stream() -> None:
    for is_extended in (False, True):
        with pytest.raises(ProtocolError):
            Owner(is_extended=is_extended).deliver(read(not is_extended) * 2)


@DIALECTS
def test_requests_before_a_bad_magic_are_returned_first(is_extended: bool) -> None:
    owner = Owner(is_extended=is_extended)
    with pytest.raises(ProtocolError):
        owner.deliver(read(is_extended, 1) + write(b"ab", is_extended, 2) + bytes(32))
    assert [request.cookie for request in owner.seen] == [1, 2]
