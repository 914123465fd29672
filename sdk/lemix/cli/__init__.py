"""The `lemix` command. Needs the `cli` extra."""

import sys


def main() -> None:
    """Entry point: run the command, tell failures in one line.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    try:
        from lemix.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"lemix: {error.name} is missing; install it with: pip install 'lemix[cli]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(run(sys.argv[1:]))
