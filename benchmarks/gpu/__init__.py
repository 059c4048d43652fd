"""Measurements on one NVIDIA GPU: `run.sh` does them all, the important ones first."""
