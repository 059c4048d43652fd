"""How codes are chosen: one file a method, registered under the file's name."""
