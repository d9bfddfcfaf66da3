"""The `adaptface` command: a module for each group of commands, which import what they need when they run."""

from adaptface.cli import data, faces, machine, models
from adaptface.cli.common import app, main

__all__ = ["app", "data", "faces", "machine", "main", "models"]
