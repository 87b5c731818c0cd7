"""What each case does, as qemu-io commands: `write` and the like through the server, `reads` there and on the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Case:
    """`number`: as QEMU's tests are called, with a letter where one has several images here.

    base: commands on a backing file of `base_size` bytes made before. before: commands by qemu-io on the image itself.
    sessions: qemu-io runs through the server, all at once. reads: what must be found afterwards, through the server and
    on the closed file. refused: commands that must fail, with nothing changed.
    """

    number: str
    subject: str
    sessions: Sequence[Sequence[str]]
    reads: Sequence[str] = ()
    options: str = ""
    size: int = 32 * MIB
    base: Sequence[str] | None = None
    base_size: int = 32 * MIB
    base_options: str = ""
    before: Sequence[str] = ()
    has_snapshot: bool = False
    is_compressed: bool = False
    refused: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class Pattern:
    """`count` writes of `length` bytes, `step` apart from `start` on; the n-th is of byte `value` + n."""

    start: int
    length: int
    step: int
    count: int
    value: int = 1

    def writes(self, command: str = "write -q") -> list[str]:
        return [f"{command} -P {self._value(n)} {self.start + n * self.step} {self.length}" for n in range(self.count)]

    def reads(self) -> list[str]:
        return [f"read -q -P {self._value(n)} {self.start + n * self.step} {self.length}" for n in range(self.count)]

    def _value(self, number: int) -> int:
        return (self.value + number - 1) % 255 + 1


def _aio(*patterns: Pattern) -> list[str]:
    return [each for pattern in patterns for each in pattern.writes("aio_write -q")] + ["aio_flush"]


def _patterns(*patterns: Pattern) -> tuple[list[list[str]], list[str]]:
    """One session that writes them all, and what reads them."""
    return [[each for p in patterns for each in p.writes()]], [each for p in patterns for each in p.reads()]


def _zeroes(offset: int | str, length: int | str) -> str:
    return f"read -q -P 0 {offset} {length}"


CLUSTER = Pattern(0, 64 * KIB, 64 * KIB, 12)
INSIDE = Pattern(2 * MIB + 2048, 4 * KIB, 64 * KIB, 12, 20)
ACROSS = Pattern(4 * MIB + 63 * KIB, 2 * KIB, 128 * KIB, 12, 40)
WIDE = Pattern(8 * MIB + 32 * KIB, 192 * KIB, 320 * KIB, 10, 60)
PATTERNS = _patterns(CLUSTER, INSIDE, ACROSS, WIDE)
BASE = ("write -q -P 200 0 16M", "write -q -P 201 20M 1M")
HIGH = 5 * 1024 * GIB

GENERAL = (
    Case("001", "whole and partial clusters keep their patterns", *PATTERNS),
    Case("002", "requests of a few sectors", *_patterns(Pattern(0, 512, 1024, 20), Pattern(MIB, 3584, 4096, 16, 50))),
    Case(
        "003",
        "vectored requests",
        [["writev -q -P 7 0 512 1024 4096 61440", "writev -q -P 8 100k 65536 512", "aio_write -q -P 9 300k 512 1024"]],
        ["readv -q -P 7 0 512 1024 4096 61440", "readv -q -P 8 100k 512 65536", "read -q -P 9 300k 1536"],
    ),
    Case(
        "004",
        "requests beyond the end are refused",
        [["write -q -P 5 33553920 512", "read -q -P 5 33553920 512"]],
        ["read -q -P 5 33553920 512", _zeroes(0, "1M")],
        refused=(
            "write 32M 512",
            "read 32M 512",
            "write 33553920 1024",
            "read 33553920 1k",
            "write 5T 64k",
            "write -z 32M 64k",
        ),
    ),
    Case(
        "005",
        "an image of 5 TiB",
        [[f"write -q -P 11 {HIGH - 64 * KIB} 64k", f"write -q -P 12 {HIGH // 2 + 512} 100k", "write -q -P 13 4095 2"]],
        [
            f"read -q -P 11 {HIGH - 64 * KIB} 64k",
            f"read -q -P 12 {HIGH // 2 + 512} 100k",
            "read -q -P 13 4095 2",
            _zeroes(HIGH - MIB, 960 * KIB),
        ],
        size=HIGH,
    ),
    Case("008", "asynchronous requests", [_aio(CLUSTER, INSIDE, ACROSS, WIDE)], PATTERNS[1]),
    Case(
        "009",
        "clusters are counted when one far behind is taken first",
        [["write -q -P 1 0 512", "write -q -P 2 30M 512", "write -q -P 3 64k 4M", "write -q -P 4 16M 4M"]],
        ["read -q -P 1 0 512", "read -q -P 2 30M 512", "read -q -P 3 64k 4M", "read -q -P 4 16M 4M"],
        options="cluster_size=1k",
    ),
    Case(
        "010",
        "clusters are counted over an allocated stretch",
        [["write -q -P 1 1M 128k", "write -q -P 2 960k 64k", "write -q -P 3 1152k 1M", "write -q -P 4 900k 2M"]],
        ["read -q -P 4 900k 2M", _zeroes(0, "900k")],
    ),
    Case(
        "011",
        "asynchronous writes into one cluster that is not there yet",
        [_aio(Pattern(0, 4096, 4096, 16), Pattern(MIB + 512, 512, 512, 100, 30), Pattern(2 * MIB, 8192, 8192, 40, 9))],
        [each for p in (Pattern(0, 4096, 4096, 16), Pattern(MIB + 512, 512, 512, 100, 30)) for each in p.reads()],
    ),
    Case("021", "a pattern that does not match is noticed", [["write -q -P 1 0 64k"]], ["read -q -P 1 0 64k"]),
    Case("032", "a client that goes with requests under way", [Pattern(0, 65536, 65536, 64).writes("aio_write -q")]),
    Case(
        "033",
        "zeroes over whole and partial sectors and clusters",
        [
            [
                "write -q -P 10 0 1M",
                "write -q -z 512 1024",
                "write -q -z 64k 64k",
                "write -q -z 200k 100k",
                "write -q -z 700000 1",
                "write -q -z 800001 4097",
            ]
        ],
        [
            "read -q -P 10 0 512",
            _zeroes(512, 1024),
            "read -q -P 10 1536 64000",
            _zeroes("64k", "64k"),
            "read -q -P 10 128k 72k",
            _zeroes("200k", "100k"),
            "read -q -P 10 300k 392800",
            _zeroes(700000, 1),
            "read -q -P 10 700001 100000",
            _zeroes(800001, 4097),
            "read -q -P 10 804098 200000",
        ],
    ),
    Case(
        "104",
        "a size that is no whole number of clusters",
        [["write -q -P 6 1000448 512", "write -q -P 7 999900 100", "write -q -z 983040 512"]],
        ["read -q -P 6 1000448 512", "read -q -P 7 999900 100", _zeroes(983040, 512)],
        size=1000960,
        refused=("write 1000960 1", "read 1000448 513"),
    ),
)

ALLOCATION = (
    Case("013", "patterns over compressed clusters", *PATTERNS, is_compressed=True),
    Case("014", "patterns over a snapshot's clusters", *PATTERNS, before=BASE, has_snapshot=True),
    Case(
        "015",
        "the refcount table grows beside a snapshot",
        *_patterns(Pattern(0, 512 * KIB, 512 * KIB, 8), Pattern(6 * MIB, 1024, 2048, 64, 90)),
        options="cluster_size=512,refcount_bits=64",
        before=("write -q -P 200 0 2M",),
        has_snapshot=True,
        size=8 * MIB,
    ),
    Case(
        "017",
        "reads from a backing file",
        [["read -q -P 200 0 16M"]],
        ["read -q -P 200 0 16M", "read -q -P 201 20M 1M"],
        base=BASE,
    ),
    Case("018", "patterns over a backing file", *PATTERNS, base=BASE),
    Case("019", "patterns over a backing file, version 2", *PATTERNS, base=BASE, options="compat=0.10"),
    Case(
        "020",
        "an overlay that is committed afterwards",
        [["write -q -P 1 1M 100k", "write -q -P 2 24M 1M", "write -q -z 2M 128k"]],
        ["read -q -P 1 1M 100k", "read -q -P 2 24M 1M", _zeroes("2M", "128k"), "read -q -P 200 3M 1M"],
        base=BASE,
    ),
    *(
        Case(f"023-{size}", f"patterns with clusters of {size}", *PATTERNS, options=f"cluster_size={size}")
        for size in ("1k", "4k", "16k", "256k")
    ),
    Case(
        "027",
        "a write of a part leaves zeroes in the rest of its cluster",
        [["write -q -P 1 65k 1k", "write -q -P 2 200k 512", "write -q -P 3 500000 1"]],
        [
            _zeroes(0, "65k"),
            "read -q -P 1 65k 1k",
            _zeroes("66k", "134k"),
            "read -q -P 2 200k 512",
            _zeroes(205312, 294688),
            "read -q -P 3 500000 1",
            _zeroes(500001, "1M"),
        ],
    ),
    Case(
        "028",
        "a backing file that ends within a cluster",
        [["write -q -P 1 1049000 1000", "write -q -P 2 980k 1k", "read -q -P 200 1048576 424"]],
        [
            "read -q -P 200 0 980k",
            "read -q -P 2 980k 1k",
            "read -q -P 200 981k 43k",
            "read -q -P 200 1048576 424",
            "read -q -P 1 1049000 1000",
            _zeroes(1050624, "1M"),
        ],
        base=("write -q -P 200 0 1050624",),
        base_size=1050624,
    ),
    Case(
        "035",
        "asynchronous writes over more tables than fit",
        [_aio(Pattern(0, 512, 40 * KIB, 200), Pattern(16 * MIB, 1024, 33 * KIB, 200, 77))],
        [*Pattern(0, 512, 40 * KIB, 200).reads(), *Pattern(16 * MIB, 1024, 33 * KIB, 200, 77).reads()],
        options="cluster_size=512",
    ),
    Case(
        "037",
        "heads and tails copied from a backing file",
        [["write -q -P 1 4k 1k", "write -q -P 2 100k 60k", "write -q -P 3 255k 2k"]],
        [
            "read -q -P 200 0 4k",
            "read -q -P 1 4k 1k",
            "read -q -P 200 5k 95k",
            "read -q -P 2 100k 60k",
            "read -q -P 200 160k 95k",
            "read -q -P 3 255k 2k",
            "read -q -P 200 257k 1M",
        ],
        base=BASE,
    ),
    Case(
        "038",
        "heads and tails copied by asynchronous writes",
        [_aio(Pattern(512, 1024, 4096, 60), Pattern(2 * MIB + 1024, 63 * KIB, 64 * KIB, 10, 70))],
        [
            *Pattern(512, 1024, 4096, 60).reads(),
            *Pattern(2 * MIB + 1024, 63 * KIB, 64 * KIB, 10, 70).reads(),
            *(f"read -q -P 200 {1536 + n * 4096} 3072" for n in range(60)),
            *(f"read -q -P 200 {2 * MIB + n * 64 * KIB} 1024" for n in range(10)),
        ],
        base=BASE,
    ),
    Case(
        "046",
        "clusters allocated at once from several clients",
        [_aio(Pattern(start, 3 * KIB, 24 * KIB, 120, 1 + start // KIB)) for start in (0, 3 * KIB, 6 * KIB, 21 * KIB)],
        [
            *(each for k in (0, 3, 6, 21) for each in Pattern(k * KIB, 3 * KIB, 24 * KIB, 120, 1 + k).reads()),
            *(f"read -q -P 200 {9 * KIB + n * 24 * KIB} 12k" for n in range(120)),
        ],
        base=BASE,
        options="cluster_size=16k",
    ),
    Case(
        "047",
        "a write over allocated and new clusters",
        [["write -q -P 1 0 3M", "write -q -P 2 2M 4M", "write -q -P 3 1M 16M"]],
        ["read -q -P 1 0 1M", "read -q -P 3 1M 16M", _zeroes("17M", "1M")],
        options="cluster_size=4k",
    ),
    Case(
        "073",
        "stretches of mixed clusters",
        [["write -q -P 1 0 256k", "write -q -z 64k 64k", "write -q -P 2 256k 1k", "write -q -P 3 192k 128k"]],
        ["read -q -P 1 0 64k", _zeroes("64k", "64k"), "read -q -P 1 128k 64k", "read -q -P 3 192k 128k"],
        before=("write -q -z 256k 256k",),
        base=BASE,
    ),
    Case(
        "107",
        "many entries of the L1 table change",
        *_patterns(Pattern(0, 512, 32 * KIB, 256), Pattern(16 * MIB, 1024, 32 * KIB, 256, 99)),
        options="cluster_size=512",
    ),
    Case(
        "121",
        "refcount blocks and the refcount table grow",
        *_patterns(Pattern(0, 256 * KIB, 256 * KIB, 24)),
        options="cluster_size=512,refcount_bits=64",
    ),
    Case(
        "265",
        "sub-cluster writes from the end to the beginning",
        [[f"write -q -P {n + 1} {n * 2048} 2048" for n in reversed(range(96))]],
        [f"read -q -P {n + 1} {n * 2048} 2048" for n in range(96)],
    ),
    Case(
        "268", "requests larger than a cluster", *_patterns(Pattern(1024, 4096, 8192, 30)), options="cluster_size=512"
    ),
    Case(
        "270",
        "one large write",
        [["write -q -P 9 1M 30M"]],
        ["read -q -P 9 1M 30M", _zeroes(0, "1M")],
        options="cluster_size=2M",
    ),
    Case(
        "305",
        "a write that takes several allocations",
        [["write -q -P 1 64k 64k", "write -q -P 2 0 512k", "write -q -P 3 500k 1M"]],
        ["read -q -P 2 0 500k", "read -q -P 3 500k 1M"],
        before=("write -q -P 200 192k 64k", "write -q -P 200 320k 64k"),
        has_snapshot=True,
    ),
)

ZEROES = (
    Case(
        "034",
        "zeroes hide a backing file",
        [["write -q -z 0 64k", "write -q -z 100k 30k", "write -q -z -u 1M 1M", "write -q -z 20M 12M"]],
        [
            _zeroes(0, "64k"),
            "read -q -P 200 64k 36k",
            _zeroes("100k", "30k"),
            "read -q -P 200 130k 894k",
            _zeroes("1M", "1M"),
            "read -q -P 200 2M 14M",
            _zeroes("20M", "12M"),
        ],
        base=BASE,
    ),
    Case(
        "154",
        "zeroes in parts of clusters over a backing file",
        [
            [
                "write -q -z 4k 1k",
                "write -q -z 19M 2k",
                "write -q -z 20476k 8k",
                "write -q -P 5 64k 512",
                "write -q -z 66k 2k",
            ]
        ],
        [
            "read -q -P 200 0 4k",
            _zeroes("4k", "1k"),
            "read -q -P 200 5k 59k",
            "read -q -P 5 64k 512",
            "read -q -P 200 66048 1536",
            _zeroes("66k", "2k"),
            "read -q -P 200 68k 1M",
            _zeroes("20476k", "8k"),
            "read -q -P 201 20484k 1000k",
        ],
        base=BASE,
    ),
    Case(
        "179",
        "zeroes with and without giving space back",
        [
            [
                "write -q -z 0 2M",
                "write -q -z -u 4M 2M",
                "write -q -P 3 1M 64k",
                "write -q -z -u 5M 64k",
                "write -q -z 1M 64k",
            ]
        ],
        [_zeroes(0, "2M"), "read -q -P 200 2M 2M", _zeroes("4M", "2M"), "read -q -P 200 6M 1M"],
        before=("write -q -P 200 0 8M",),
    ),
    Case(
        "250",
        "a discard of very many clusters",
        [["write -q -P 1 0 2M", "write -q -P 2 150G 1M", "discard -q 1M 1G", "discard -q 149G 1500M"]],
        ["read -q -P 1 0 1M", _zeroes("1M", "1M"), _zeroes("150G", "1M")],
        size=300 * GIB,
        options="cluster_size=1M",
    ),
    Case(
        "271",
        "subclusters are allocated, zeroed and discarded",
        [
            [
                "write -q -P 1 0 2k",
                "write -q -P 2 10k 3k",
                "write -q -z 4k 2k",
                "write -q -z -u 64k 64k",
                "write -q -P 3 70k 1k",
                "write -q -P 4 128k 192k",
                "discard -q 192k 64k",
                "write -q -P 5 200k 100",
                "discard -q 131072 2048",
            ]
        ],
        [
            "read -q -P 1 0 2k",
            "read -q -P 200 2k 2k",
            _zeroes("4k", "2k"),
            "read -q -P 200 6k 4k",
            "read -q -P 2 10k 3k",
            "read -q -P 200 13k 51k",
            _zeroes("64k", "6k"),
            "read -q -P 3 70k 1k",
            _zeroes("71k", "57k"),
            _zeroes("128k", "2k"),
            "read -q -P 4 130k 62k",
            _zeroes("192k", "8k"),
            "read -q -P 5 200k 100",
            _zeroes(204900, 57244),
            "read -q -P 4 256k 64k",
        ],
        options="extended_l2=on",
        base=BASE,
    ),
    Case(
        "290-2",
        "a discard with version 2 leaves zeroes or what was there",
        [["discard -q 64k 64k", "write -q -P 4 128k 1k"]],
        ["read -q -P 200 0 64k", _zeroes("64k", "64k"), "read -q -P 4 128k 1k", "read -q -P 200 129k 63k"],
        options="compat=0.10",
        before=("write -q -P 200 0 192k",),
    ),
    Case(
        "290-3",
        "a discard with version 3 hides the backing file",
        [["discard -q 64k 64k", "discard -q 256k 128k"]],
        [
            "read -q -P 7 0 64k",
            _zeroes("64k", "64k"),
            "read -q -P 7 128k 64k",
            _zeroes("256k", "128k"),
            "read -q -P 200 1M 1M",
        ],
        base=BASE,
        before=("write -q -P 7 0 192k",),
    ),
    Case(
        "313",
        "zeroes that give space back, and writes into the same clusters again",
        [
            [
                "write -q -z -u 0 1M",
                "write -q -P 2 32k 64k",
                "write -q -z -u 64k 64k",
                "write -q -z 32k 16k",
                "write -q -P 3 960k 128k",
            ]
        ],
        [
            _zeroes(0, "48k"),
            "read -q -P 2 48k 16k",
            _zeroes("64k", "64k"),
            _zeroes("128k", "832k"),
            "read -q -P 3 960k 128k",
            "read -q -P 200 1088k 64k",
        ],
        options="extended_l2=on",
        before=("write -q -P 200 0 2M",),
    ),
)

CASES = {case.number: case for case in (*GENERAL, *ALLOCATION, *ZEROES)}
