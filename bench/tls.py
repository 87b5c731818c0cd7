"""`python -m bench.tls`, run from the project's root: the throughput table's cells under TLS 1.3, beside qemu-nbd.

One raw image in the page cache, Unix sockets, an x509 certificate for the server and none for the client, which is
libnbd with GnuTLS for all servers; fio lets no URI name files, so it does not verify the server.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from bench import environment, fio
from bench.cells import CELLS, KIB
from bench.formats import EXIT_BELOW, FormatCell, is_below, report
from bench.image import settle, warm
from bench.results import Sample
from bench.servers import ServerSpec
from bench.throughput import rotated
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.server import NbdimgServer, PeerServer

SIZE = 512 * 1024 * KIB
GOAL = 1.5


def _rows(patterns: Sequence[str]) -> list[FormatCell]:
    return [FormatCell(each, "", GOAL, GOAL) for each in CELLS if any(fnmatchcase(each.name, p) for p in patterns)]


def _qemu_nbd(aio: str, credentials: Path) -> Callable[[str, Path], list[str]]:
    def argv(socket_path: str, image: Path) -> list[str]:
        tls = f"tls-creds-x509,id=t,dir={credentials},endpoint=server,verify-peer=off"
        options = ["-f", "raw", "-e", "64", "-t", "--cache=writeback", f"--aio={aio}", "-k", socket_path]
        return ["qemu-nbd", "--object", tls, "--tls-creds", "t", *options, str(image)]

    return argv


@contextmanager
def _started(server: ServerSpec, image: Path, identity: Identity) -> Iterator[str]:
    """A server on `image` for the length of the block; gives its URI."""
    argv = server.peer_argv
    process: NbdimgServer | PeerServer
    if argv is None:
        files = [f"--tls-certificate={identity.certificate_path}", f"--tls-key={identity.key_path}"]
        process = NbdimgServer(image, options=["--format=raw", *files])
    else:
        process = PeerServer(lambda path: argv(path, image))
    with process:
        yield f"nbds+unix:///?socket={process.socket_path}&tls-verify-peer=false"


def measure(
    rows: Sequence[FormatCell],
    servers: Sequence[ServerSpec],
    image: Path,
    identity: Identity,
    rounds: int,
    seconds: float,
) -> list[Sample]:
    """All samples; within a round the servers of a row run back to back, in a rotating order."""
    samples = []
    for index, row in enumerate(rows):
        cell = row.cell
        for round_index in range(rounds):
            for server in rotated(servers, round_index + index):
                print(f"{row.name}, round {round_index + 1}: {server.name}", file=sys.stderr)
                settle(image)
                warm(image, 0, SIZE)
                try:
                    with _started(server, image, identity) as uri:
                        job = fio.Job(uri, cell.mode, cell.block_size, cell.depth, SIZE, seconds, cell.connections)
                        samples.append(Sample(cell.name, server.name, round_index, fio.run(job)))
                except (fio.FioError, RuntimeError, OSError) as error:
                    samples.append(Sample(cell.name, server.name, round_index, None, str(error) or repr(error)))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--cells", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write tls.md and tls.json there")
    options = parser.parse_args()
    rows = _rows(options.cells)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        image = Path(directory, "disk.img")
        image.write_bytes(b"\7" * SIZE)
        authority = Authority(Path(directory, "ca"))
        identity = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
        servers = (
            ServerSpec("nbdimg", (sys.executable, "-m", "nbdimg", "--version")),
            *(
                ServerSpec(f"qemu-nbd {aio}", ("qemu-nbd", "--version"), _qemu_nbd(aio, identity.directory))
                for aio in ("threads", "io_uring")
            ),
        )
        facts = environment.facts(Path(directory))
        steal = environment.Steal()
        samples = measure(rows, servers, image, identity, options.rounds, options.seconds)
        steal.add_to(facts)
    command = f"python -m bench.tls --rounds {options.rounds} --seconds {options.seconds:g}"
    report("tls", "raw under TLS 1.3", command, facts, rows, samples, options.output)
    return EXIT_BELOW if is_below(rows, samples) else 0


if __name__ == "__main__":
    sys.exit(main())
