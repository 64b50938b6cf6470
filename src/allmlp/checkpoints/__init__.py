"""Models as files: run directories, and the checkpoints of other projects."""

from allmlp.checkpoints.run_directory import load

__all__ = ["load"]
