"""`python -m qcli`: what `torchrun -m qcli` starts."""

from qcli.cli.main import main

main()
