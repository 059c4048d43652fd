"""What codes mean: one file a format, registered under the file's name."""
