"""Who may open an export, and with what right. Decisions only: what is known of a client is found out elsewhere.

right of a client = the highest right of the rules that match it; WRITE for everybody when there are no rules
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network


class Right(IntEnum):
    """What a client may do with an export; with NONE it looks as if it were not there."""

    NONE = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Client:
    """What is known of who is connected: an IP client has an `address`, a Unix client a `uid` and a `gid`.

    `identities`, as `dns:host.example`, are proven: by TLS, never by what a client says of itself.
    """

    address: IPv4Address | IPv6Address | None = None
    uid: int | None = None
    gid: int | None = None
    identities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """Each condition that is not empty must hold, by one of its values. Identities are written as `normalized` does."""

    identities: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    right: Right = Right.WRITE

    def matches(self, client: Client) -> bool:
        return (
            (not self.identities or not self.identities.isdisjoint(client.identities))
            and (not self.networks or _is_within(client.address, self.networks))
            and (not self.uids or client.uid in self.uids)
            and (not self.gids or client.gid in self.gids)
        )


def normalized(identity: str) -> str:
    """An identity as it is compared: host names have no case, everything else has. It is ASCII's: in Unicode's, some
    other letters are equal to these (the sign of the kelvin to a K), and a certificate may hold any.
    """
    if not identity.startswith("dns:"):
        return identity
    return identity.encode(errors="surrogatepass").lower().decode(errors="surrogatepass")


def right_of(client: Client, rules: Sequence[Rule]) -> Right:
    """The highest right that a rule gives `client`."""
    if not rules:
        return Right.WRITE
    return max((rule.right for rule in rules if rule.matches(client)), default=Right.NONE)


def _is_within(address: IPv4Address | IPv6Address | None, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Numbers are compared, not texts: as a text, 10.0.0.10 begins with 10.0.0.1 (CVE-2013-6410)."""
    if address is None:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)
