"""`python -m nbdimg` and the console script `nbdimg`."""

import sys


def main() -> None:
    """Run the command line, and end. A health check comes without all the rest: probes run it every few seconds."""
    if sys.argv[1:2] == ["healthcheck"]:
        from nbdimg.cli.healthcheck import main as healthcheck

        sys.exit(healthcheck(sys.argv[2:]))
    from nbdimg.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
