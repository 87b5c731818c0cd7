"""`python -m nbdimg` and the console script `nbdimg`."""

import sys

from nbdimg.cli.interrupt import end_at_interrupt
from nbdimg.cli.streams import exit_with, open_standard_streams


def main() -> None:
    """Run the command line, and end. A health check comes without all the rest: probes run it every few seconds."""
    end_at_interrupt()
    open_standard_streams()
    if sys.argv[1:2] == ["healthcheck"]:
        from nbdimg.cli.healthcheck import main as healthcheck

        exit_with(healthcheck(sys.argv[2:]))
    from nbdimg.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
