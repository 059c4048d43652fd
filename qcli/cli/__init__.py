"""The commands; a file each. Nothing here imports torch, pydantic or rich before a command runs."""
