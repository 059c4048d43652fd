"""Rewrites before any method: one file a transform, registered under the file's name."""
