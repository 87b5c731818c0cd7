"""What every comparison of raw servers begins and ends with: options, the image, who takes part, a bar, the facts."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import environment, fio
from bench.cells import MIB
from bench.image import create_image, warm
from bench.results import Run
from bench.servers import SUBJECT, ServerSpec

ROUNDS = 3
SECONDS = 3.0
IMAGE_SIZE = 512 * MIB


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return convert


@contextmanager
def recorded(
    command: str, specs: Sequence[ServerSpec], rounds: int, seconds: float, size: int, parent: Path | None
) -> Iterator[tuple[Run, list[ServerSpec], Path]]:
    """A run with nothing measured yet, those of `specs` that start here, and an image in the page cache that goes with
    the block; `parent` is the directory for it, None a temporary one. The facts are complete behind the block.

    Raises: ValueError when fio is missing.
    """
    if fio.version() == "missing":
        raise ValueError("fio is not installed")
    with tempfile.TemporaryDirectory(prefix="nbdimg-bench-", dir=parent) as directory:
        steal = environment.Steal()
        image = Path(directory, "bench.raw")
        create_image(image, size)
        warm(image, 0, size)
        reasons = {spec.name: spec.missing(image) for spec in specs}
        servers = [spec for spec in specs if reasons[spec.name] is None]
        run = Run(
            command=command,
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            subject=SUBJECT.name,
            rounds=rounds,
            seconds=seconds,
            image_size=size,
            facts=environment.facts(Path(directory)),
            servers={spec.name: spec.version() for spec in servers},
            missing={name: reason for name, reason in reasons.items() if reason is not None},
        )
        yield run, servers, image
    run.facts["load average at end"] = environment.load_average()
    steal.add_to(run.facts)


@contextmanager
def progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function that it gives is called with the name of each step as that step begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("start", total=total)
        done = -1

        def step(description: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=description)

        yield step
        bar.update(task, completed=total)


def end_on_signals() -> None:
    """A benchmark that is told to end must still end its servers and remove its image and control group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
