"""`python -m nbdimg` is the command `nbdimg`."""

from nbdimg.cli.main import main

if __name__ == "__main__":
    main()
