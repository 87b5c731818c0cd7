"""Which overlay a name and a client's identities mean, and the file that it lies in."""

from __future__ import annotations

import pytest

from nbdimg.export.access import Client
from nbdimg.export.export import Export
from nbdimg.export.overlays import is_overlay_name, overlay_file_name, overlay_prefix, proven_name
from nbdimg.export.registry import Registry, View
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.constants import TransmissionFlag


@pytest.mark.parametrize("name", ["a", "vm42", "VM-42.example_1", "0", "a..b", "a" * 128])
def test_overlay_name_of_letters_digits_and_three_signs_is_allowed(name: str) -> None:
    assert is_overlay_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "_a", "a/b", "../x", "a\0", "a\n", "a b", "a@b", "dns=a", "a%2F", "ä", "a" * 129],
)
def test_overlay_name_of_anything_else_is_not(name: str) -> None:
    assert not is_overlay_name(name)


@pytest.mark.parametrize(
    ("identities", "name"),
    [
        ((), None),
        (("cn:alice",), "cn=alice"),
        (("cn:a", "dns:vm42.example", "spki-sha256:00"), "dns=vm42.example"),
        (("dns:b", "dns:a", "email:z@z"), "dns=a"),
        (("uri:spiffe://example/vm 1", "cn:x"), "uri=spiffe%3A%2F%2Fexample%2Fvm%201"),
        (("email:a@b", "psk:k"), "email=a%40b"),
        (("psk:../k",), "psk=..%2Fk"),
        (("spki-sha256:00ff",), "spki-sha256=00ff"),
        (("cn:dns:a",), "cn=dns%3Aa"),
        (("cn:ä",), "cn=%C3%A4"),
    ],
)
def test_proven_name_is_the_first_identity_and_nobody_can_ask_for_it(
    identities: tuple[str, ...], name: str | None
) -> None:
    assert proven_name(frozenset(identities)) == name
    assert name is None or not is_overlay_name(name)


@pytest.mark.parametrize(
    ("export", "name", "file"),
    [
        ("base", "vm42", "base@vm42.qcow2"),
        ("a/b", "x", "a%2Fb@x.qcow2"),
        ("..", "x", "..@x.qcow2"),
        ("a@b", "x", "a%40b@x.qcow2"),
        ("a:b\n", "x", "a%3Ab%0A@x.qcow2"),
        ("base", "uri=%2F", "base@uri=%2F.qcow2"),
        ("e" * 120, "n" * 128, f"{'e' * 120}@{'n' * 128}.qcow2"),
        ("e" * 121, "n" * 128, None),
    ],
)
def test_overlay_file_is_one_component_of_at_most_255_bytes(export: str, name: str, file: str | None) -> None:
    assert overlay_file_name(export, name) == file
    assert file is None or file.startswith(overlay_prefix(export))


# Names in a registry


class Lender:
    """Overlays that nobody enters."""

    size = 1024
    lent = frozenset[Export]()

    def __init__(self, *, is_kept: bool) -> None:
        self.is_kept = is_kept

    async def attach(self, name: str | None, limits: Limits, *, may_make: bool) -> Export:
        raise NotImplementedError

    async def detach(self, export: Export) -> bool:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def plain(name: str) -> Export:
    return Export(name, Image(RawDriver(MemoryFile(bytes(1000))), writable=False), payload_max=1 << 20)


def registry() -> Registry:
    """An export that keeps overlays, two of other kinds, and one whose name looks like an overlay's."""
    made = Registry()
    for name in ("kept", "own", "plain", "kept@taken"):
        export = plain(name)
        if name in ("kept", "own"):
            export.lend(Lender(is_kept=name == "kept"))
        made.add(export)
    return made


def view(identities: frozenset[str] = frozenset(), refused: list[str] | None = None) -> View:
    log = [] if refused is None else refused
    return View(
        registry(), Client(identities=identities), lambda export, reason: log.append(f"{export.name}: {reason}")
    )


@pytest.mark.parametrize(
    ("name", "export", "whole", "overlay"),
    [
        ("kept@vm1", "kept", "kept@vm1", "vm1"),
        ("/kept@vm1", "kept", "kept@vm1", "vm1"),
        ("kept@taken", "kept@taken", "kept@taken", None),
        ("own", "own", "own", None),
        ("plain", "plain", "plain", None),
    ],
)
def test_resolve_finds_the_overlay_or_the_export_of_that_whole_name(
    name: str, export: str, whole: str, overlay: str | None
) -> None:
    wanted = view().resolve(name)
    assert wanted is not None
    assert (wanted.export.name, wanted.name, wanted.overlay) == (export, whole, overlay)


@pytest.mark.parametrize(
    "name", ["own@vm1", "plain@vm1", "absent@vm1", "@vm1", "kept@", "kept@a@b", "kept@../x", "vm1"]
)
def test_resolve_of_an_overlay_where_there_is_none_finds_nothing(name: str) -> None:
    assert view().resolve(name) is None
    assert view().find(name) is None


def test_kept_export_by_its_own_name_is_there_only_for_a_proven_identity() -> None:
    refused: list[str] = []
    assert view(refused=refused).find("kept") is None
    (line,) = refused
    assert "'kept@NAME'" in line
    wanted = view(frozenset({"dns:vm1"})).resolve("kept")
    assert wanted is not None
    assert (wanted.name, wanted.overlay) == ("kept", "dns=vm1")
    assert [info.name for info in view().listed()] == ["own", "plain", "kept@taken"]
    assert [info.name for info in view(frozenset({"dns:vm1"})).listed()] == ["kept", "own", "plain", "kept@taken"]


def test_info_of_overlays_is_writable_and_only_kept_ones_are_one_disk_for_several_connections() -> None:
    kept, own, other = (view().find(name) for name in ("kept@vm1", "own", "plain"))
    assert kept is not None
    assert own is not None
    assert other is not None
    for info in (kept, own):
        assert not info.flags & TransmissionFlag.READ_ONLY
        assert info.flags & TransmissionFlag.SEND_TRIM
        assert info.is_made_on_entry
        assert info.size == 1024
    assert kept.flags & TransmissionFlag.CAN_MULTI_CONN
    assert not own.flags & TransmissionFlag.CAN_MULTI_CONN
    assert not other.is_made_on_entry
