"""Transforms that come before the method. One file per transform, registered under the file's name."""
