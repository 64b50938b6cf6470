"""Models in the form that runs fastest on this machine."""

from allmlp.deploy.optimization import Candidate, OptimizedModel, optimize

__all__ = ["Candidate", "OptimizedModel", "optimize"]
