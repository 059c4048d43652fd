"""`python -m qcli`, which `torchrun -m qcli` starts."""

from qcli.cli.main import main

main()
