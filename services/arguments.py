"""Command lines whose usage errors are one line, like every other bad input."""

import argparse
import sys
from typing import NoReturn


def parser_class(name: str) -> type[argparse.ArgumentParser]:
    """A parser, for sub-commands too, that says `name: what is wrong` on stderr and exits with code 2."""

    class OneLine(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            line = " ".join(message.splitlines())
            sys.stderr.write(f"{name}: {line} (--help lists the options)\n")
            sys.exit(2)

    return OneLine
