"""``python -m intarsia``: the command line, for launchers such as torchrun."""

from intarsia.cli.app import main

main()
