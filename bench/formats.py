"""`python -m bench.formats`, run from the project's root: qcow2 and VHDX through nbdimg and qemu-nbd, interleaved.

All images are made by qemu-img and written by qemu-io, so that none has a layout of nbdimg's making. What allocates
gets a fresh image for each sample; what reads or overwrites finds a full one in the page cache. A depth counts per
connection.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from bench import environment, fio
from bench.cells import CELLS, KIB, MIB, Cell
from bench.image import settle, warm
from bench.report import CellSummary, Verdict, summarize
from bench.results import Sample
from bench.servers import ServerSpec
from bench.throughput import rotated
from tests.support.server import NbdimgServer, PeerServer

SIZE = 1024 * MIB
NEW_SIZE = 8 * SIZE
"""Of images that are allocated: larger than what any server fills in a sample."""
COMPRESSED_SIZE = 256 * MIB
TEXT_SEED = 20261122
JSON_VERSION = 1
EXIT_BELOW = 1


@dataclass(frozen=True, slots=True)
class FormatCell:
    """One row. `image` is a key of `_MAKERS`; `goal` and `floor` are ratios over the better of qemu-nbd's aio modes.
    `flush_every` counts writes.
    """

    cell: Cell
    image: str
    goal: float
    floor: float
    flush_every: int = 0

    @property
    def name(self) -> str:
        return self.cell.name


def _rows(format: str) -> tuple[FormatCell, ...]:
    full = [FormatCell(cell, "full", 2.0, 1.0 if cell.depth * cell.connections == 1 else 1.3) for cell in CELLS]
    if format == "vhdx":
        cell = Cell("new-1m-write-8", "1 MiB first write, depth 8, a flush every 64 MiB", "write", MIB, 8)
        return (*full, FormatCell(cell, "new", 5.0, 3.0, flush_every=64))
    new = (
        Cell("new-4k-randwrite-16", "4 KiB random first write, depth 16", "randwrite", 4 * KIB, 16),
        Cell("new-64k-write-16", "64 KiB first write, depth 16", "write", 64 * KIB, 16),
        Cell("new-1m-write-8", "1 MiB first write, depth 8", "write", MIB, 8),
    )
    compressed = (
        Cell("zlib-64k-read-8", "64 KiB read of compressed clusters, depth 8", "read", 64 * KIB, 8),
        Cell("zlib-4k-read-16", "4 KiB read of compressed clusters, depth 16", "read", 4 * KIB, 16),
    )
    chain = Cell("chain-4k-randread-16", "4 KiB random read through 3 files, depth 16", "randread", 4 * KIB, 16)
    return (
        *full,
        *(FormatCell(cell, "new", 3.0, 1.3) for cell in new),
        FormatCell(chain, "chain", 2.0, 1.3),
        *(FormatCell(cell, "compressed", 2.0, 2.0) for cell in compressed),
    )


def _tool(*argv: str | Path) -> None:
    subprocess.run([str(each) for each in argv], check=True, stdout=subprocess.DEVNULL)


def _options(format: str) -> list[str]:
    return ["-o", "block_size=1M,block_state_zero=off"] if format == "vhdx" else []


def _full(path: Path, format: str) -> None:
    _tool("qemu-img", "create", "-q", "-f", format, *_options(format), path, str(SIZE))
    _tool("qemu-io", "-f", format, "-c", f"write -P 7 0 {SIZE}", path)


def _new(path: Path, format: str) -> None:
    path.unlink(missing_ok=True)
    _tool("qemu-img", "create", "-q", "-f", format, *_options(format), path, str(NEW_SIZE))


def _chain(path: Path, format: str) -> None:
    """Three files, all data in the lowest."""
    below = path
    for depth in range(2):
        below = path.with_name(f"chain-{depth}.{format}")
        if depth == 0:
            _full(below, format)
        else:
            _tool("qemu-img", "create", "-q", "-f", format, "-b", "chain-0." + format, "-F", format, below)
    _tool("qemu-img", "create", "-q", "-f", format, "-b", below.name, "-F", format, path)


def _compressed(path: Path, format: str) -> None:
    """Text of random words: it deflates to about half."""
    rng = random.Random(TEXT_SEED)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz ", k=rng.randrange(3, 12))) for _ in range(3000)]
    raw = path.with_suffix(".raw")
    with open(raw, "wb") as file:
        for _ in range(COMPRESSED_SIZE // MIB):
            file.write(b"".join(rng.choices(words, k=200_000))[:MIB].ljust(MIB))
    _tool("qemu-img", "convert", "-c", "-O", format, raw, path)
    raw.unlink()


_MAKERS: dict[str, Callable[[Path, str], None]] = {
    "full": _full,
    "new": _new,
    "chain": _chain,
    "compressed": _compressed,
}


def _qemu_nbd(format: str, aio: str) -> Callable[[str, Path], list[str]]:
    def argv(socket_path: str, image: Path) -> list[str]:
        options = ["-e", "64", "-t", "--cache=writeback", "--discard=unmap", f"--aio={aio}"]
        return ["qemu-nbd", "-f", format, *options, "-k", socket_path, str(image)]

    return argv


def _servers(format: str) -> tuple[ServerSpec, ...]:
    return (
        ServerSpec("nbdimg", (sys.executable, "-m", "nbdimg", "--version")),
        ServerSpec("qemu-nbd threads", ("qemu-nbd", "--version"), _qemu_nbd(format, "threads")),
        ServerSpec("qemu-nbd io_uring", ("qemu-nbd", "--version"), _qemu_nbd(format, "io_uring")),
    )


def _sample(row: FormatCell, server: ServerSpec, image: Path, format: str, round_index: int, seconds: float) -> Sample:
    if row.image == "new":
        _new(image, format)
    size = {"new": NEW_SIZE, "compressed": COMPRESSED_SIZE}.get(row.image, SIZE)
    settle(image)
    for each in image.parent.iterdir():
        warm(each, 0, each.stat().st_size)
    cell = row.cell
    try:
        with _started(server, image, format) as uri:
            job = fio.Job(
                uri,
                cell.mode,
                cell.block_size,
                cell.depth,
                size,
                seconds,
                cell.connections,
                flush_every=row.flush_every,
            )
            return Sample(cell.name, server.name, round_index, fio.run(job))
    except (fio.FioError, RuntimeError, OSError) as error:
        return Sample(cell.name, server.name, round_index, None, str(error) or repr(error))


@contextmanager
def _started(server: ServerSpec, image: Path, format: str) -> Iterator[str]:
    """A server on `image` for the length of the block; gives its URI."""
    argv = server.peer_argv
    process: NbdimgServer | PeerServer
    if argv is None:
        process = NbdimgServer(image, options=["--format", format])
    else:
        process = PeerServer(lambda path: argv(path, image))
    with process:
        yield f"nbd+unix:///?socket={process.socket_path}"


def measure(rows: Sequence[FormatCell], format: str, directory: Path, rounds: int, seconds: float) -> list[Sample]:
    """All samples; within a round the servers of a row run back to back, in a rotating order."""
    servers = _servers(format)
    samples = []
    for index, row in enumerate(rows):
        home = directory / row.image
        image = home / f"disk.{format}"
        if not home.exists():
            home.mkdir()
            _MAKERS[row.image](image, format)
        for round_index in range(rounds):
            for server in rotated(servers, round_index + index):
                print(f"{row.name}, round {round_index + 1}: {server.name}", file=sys.stderr)
                samples.append(_sample(row, server, image, format, round_index, seconds))
        if row.image == "new":
            _new(image, format)
    return samples


def table(rows: Sequence[FormatCell], samples: Sequence[Sample]) -> str:
    """The rows as Markdown."""
    lines = [
        "| cell | nbdimg | qemu-nbd threads | qemu-nbd io_uring | ratio | low | high | goal | floor | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        summary = summarize(samples, row.name, "nbdimg")
        rates = " | ".join(_rate(row.cell, summary, server.name) for server in _servers(""))
        ratios = " | ".join("-" if each is None else f"{each:.2f}" for each in _ratios(summary))
        lines.append(
            f"| {row.cell.title} | {rates} | {ratios} | {row.goal:g} | {row.floor:g} | {_verdict(row, summary)} |"
        )
    return "\n".join(lines)


def _ratios(summary: CellSummary) -> tuple[float | None, ...]:
    return summary.ratio, summary.ratio_low, summary.ratio_high


def _rate(cell: Cell, summary: CellSummary, server: str) -> str:
    value = summary.medians.get(server)
    if value is None:
        return "failed"
    return f"{value / 1000:.1f}k/s" if cell.unit == "IOPS" else f"{value * cell.block_size / 1e6:.0f} MB/s"


def _verdict(row: FormatCell, summary: CellSummary) -> str:
    if summary.verdict(row.goal) is Verdict.PASS:
        return "goal"
    return {Verdict.PASS: "floor", Verdict.FAIL: "below", Verdict.UNJUDGED: "not judged"}[summary.verdict(row.floor)]


def is_below(rows: Sequence[FormatCell], samples: Sequence[Sample]) -> bool:
    """Whether a row misses its floor."""
    return any(_verdict(row, summarize(samples, row.name, "nbdimg")) == "below" for row in rows)


def report(
    name: str,
    title: str,
    command: str,
    facts: Mapping[str, str],
    rows: Sequence[FormatCell],
    samples: Sequence[Sample],
    output: Path | None,
) -> None:
    """Print the table, and write NAME.md and NAME.json into `output` if it is given."""
    text = table(rows, samples)
    print(text)
    if output is None:
        return
    heading = f"# {title}\n\nMade by `{command}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    lines = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    page = f"{heading}.\n\n| fact | value |\n|---|---|\n{lines}\n\n{text}\n"
    (output / f"{name}.md").write_text(page)
    record = {"version": JSON_VERSION, "command": command, "facts": facts, "samples": [asdict(s) for s in samples]}
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=__doc__)
    parser.add_argument("--format", choices=("qcow2", "vhdx"), default="qcow2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--cells", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the images go, removed at the end")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write FORMAT.md and FORMAT.json there")
    options = parser.parse_args()
    rows = [row for row in _rows(options.format) if any(fnmatchcase(row.name, each) for each in options.cells)]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
        facts = environment.facts(Path(directory))
        steal = environment.Steal()
        samples = measure(rows, options.format, Path(directory), options.rounds, options.seconds)
        steal.add_to(facts)
    command = (
        f"python -m bench.formats --format {options.format} --rounds {options.rounds} --seconds {options.seconds:g}"
    )
    title = f"{options.format} through nbdimg and qemu-nbd"
    report(options.format, title, command, facts, rows, samples, options.output)
    return EXIT_BELOW if is_below(rows, samples) else 0


if __name__ == "__main__":
    sys.exit(main())
