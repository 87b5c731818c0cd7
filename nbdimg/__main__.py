"""`python -m nbdimg` and the console script `nbdimg`."""

import os
import sys


def _open_standard_streams() -> None:
    """Where one of the three was closed, the first file to be opened would take its place, and be written to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main() -> None:
    """Run the command line, and end. A health check comes without all the rest: probes run it every few seconds."""
    _open_standard_streams()
    if sys.argv[1:2] == ["healthcheck"]:
        from nbdimg.cli.healthcheck import main as healthcheck

        sys.exit(healthcheck(sys.argv[2:]))
    from nbdimg.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
