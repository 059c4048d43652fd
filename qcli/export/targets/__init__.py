"""Layouts that `qcli pack` writes: one file a layout, registered under the file's name."""
