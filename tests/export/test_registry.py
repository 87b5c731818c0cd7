"""Names, aliases, adding and removing."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest

from nbdimg.errors import ConfigError
from nbdimg.export import registry as registry_module
from nbdimg.export.access import Client, Right, Rule, right_of
from nbdimg.export.export import Export
from nbdimg.export.registry import Registry, Terms, View
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile


def export(name: str) -> Export:
    return Export(name, Image(RawDriver(MemoryFile(bytes(512))), writable=True), payload_max=1 << 20)


def registry(*names: str) -> Registry:
    made = Registry()
    for name in names:
        made.add(export(name))
    return made


def view(exports: Registry) -> View:
    """What a client sees that no rule names."""
    return View(exports, Client(), lambda export, reason: None)


def test_lookup_by_name_and_with_a_slash() -> None:
    exports = registry("a", "b")
    for name in ("a", "/a"):
        found = exports.lookup(name)
        assert found is not None
        assert found.name == "a"


@pytest.mark.parametrize("name", ["", "c", "//a", "a/", "A", "a\0"])
def test_lookup_of_another_name_finds_nothing(name: str) -> None:
    exports = registry("a", "b")
    assert exports.lookup(name) is None
    assert view(exports).find(name) is None


def test_single_export_answers_to_the_empty_name() -> None:
    exports = registry("a")
    found = view(exports).find("")
    assert found is not None
    assert found.name == "a"
    exports.add(export("b"))
    assert view(exports).find("") is None


def test_empty_registry_answers_to_nothing() -> None:
    assert Registry().lookup("") is None
    assert Registry().lookup("/") is None
    assert list(view(Registry()).listed()) == []


def test_name_with_a_slash_of_its_own_wins_over_the_alias() -> None:
    exports = registry("a", "/a")
    found = exports.lookup("/a")
    assert found is not None
    assert found.name == "/a"


def test_slash_alone_is_no_alias_of_the_single_export_of_another_name() -> None:
    found = registry("a").lookup("/a")
    assert found is not None
    assert found.name == "a"


def test_add_of_a_taken_name_is_refused_and_keeps_the_first() -> None:
    exports = registry("a")
    first = exports.lookup("a")
    with pytest.raises(ConfigError, match="two exports are named 'a'"):
        exports.add(export("a"))
    assert exports.lookup("a") is first


def test_remove_takes_the_export_out_and_frees_its_name() -> None:
    exports = registry("a", "b")
    removed = exports.remove("a")
    assert removed.name == "a"
    assert exports.lookup("a") is None
    assert [info.name for info in view(exports).listed()] == ["b"]
    exports.add(export("a"))
    with pytest.raises(KeyError):
        exports.remove("c")


def test_terms_of_an_export_go_with_it() -> None:
    exports, others = Registry(), Terms((Rule(uids=frozenset({1})),), is_tls_only=True)
    exports.add(export("a"), others)
    assert exports.terms("a") is others
    exports.remove("a")
    with pytest.raises(KeyError):
        exports.terms("a")
    exports.add(export("a"))
    assert exports.terms("a") == Terms()


def test_listed_keeps_the_order_of_adding_and_iteration_survives_a_removal() -> None:
    exports = registry("b", "a", "c")
    assert [info.name for info in view(exports).listed()] == ["b", "a", "c"]
    for found in exports:
        exports.remove(found.name)
    assert list(exports) == []


def test_rules_are_looked_at_once_for_all_that_a_client_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 options in one packet, each over 1,000 exports, took 1.3 s."""
    looks = 0

    def counted(client: Client, rules: Sequence[Rule]) -> Right:
        nonlocal looks
        looks += 1
        return right_of(client, rules)

    monkeypatch.setattr(registry_module, "right_of", counted)
    exports, others = Registry(), Terms((Rule(networks=(ip_network("10.1.0.0/16"),)),))
    for number in range(100):
        exports.add(export(f"{number}"), others)
    seen = View(exports, Client(ip_address("10.2.0.1")), lambda export, reason: None)
    for _ in range(20):
        assert not seen.listed()
        assert seen.find("") is None
    assert looks == 100


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("disk@monday", ["disk@monday"]),
        ("/disk@monday", ["disk@monday"]),
        ("disk@tuesday", ["disk"]),
        ("disk@-", []),
        ("disk", ["disk"]),
        ("open@tuesday", []),
        ("other@monday", []),
    ],
)
def test_one_name_is_told_of_as_hidden_once(name: str, told: list[str]) -> None:
    exports, others = registry("open"), Terms((Rule(networks=(ip_network("10.1.0.0/16"),)),))
    for each in ("disk", "disk@monday"):
        exports.add(export(each), others)
    found: list[str] = []
    assert View(exports, Client(), lambda hidden, reason: found.append(hidden.name)).find(name) is None
    assert found == told


def test_what_a_client_sees_follows_terms_exports_and_who_it_is() -> None:
    exports, others = registry("a"), Terms((Rule(identities=frozenset({"cn:other"})),))

    def names() -> tuple[list[str], str | None]:
        alone = seen.find("")
        return [each.name for each in seen.listed()], None if alone is None else alone.name

    seen = view(exports)
    assert names() == (["a"], "a")
    exports.set_terms("a", others)
    assert names() == ([], None)
    exports.add(export("b"))
    assert names() == (["b"], "b")
    seen.client = Client(identities=frozenset({"cn:other"}))
    assert names() == (["a", "b"], None)
    exports.remove("b")
    assert names() == (["a"], "a")
