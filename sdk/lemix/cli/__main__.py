"""`python -m lemix.cli`."""

from lemix.cli import main

main()
