"""`python -m nbdimg` and the console script `nbdimg`."""

import sys

from nbdimg.cli.streams import open_standard_streams

EXIT_INTERRUPTED = 130
"""As of a program that SIGINT has ended: Ctrl-C, also while the program is still being loaded."""


def main() -> None:
    """Run the command line, and end. A health check comes without all the rest: probes run it every few seconds."""
    try:
        open_standard_streams()
        if sys.argv[1:2] == ["healthcheck"]:
            from nbdimg.cli.healthcheck import main as healthcheck

            sys.exit(healthcheck(sys.argv[2:]))
        from nbdimg.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
