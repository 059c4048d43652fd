"""Weight formats, one file each, registered under the file's name."""
