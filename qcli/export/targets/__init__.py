"""Export targets: what `qcli pack --format` writes, one file each, registered under the file's name."""
