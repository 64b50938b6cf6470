"""The small model of each family, which stands for it in the tests."""

import timm

import allmlp  # noqa: F401  (registers the models)

NANO = [name for name in timm.list_models("*_nano_patch*_32") if timm.model_entrypoint(name).__module__[:6] == "allmlp"]
# Those that take any image size, and those whose weights are tied to one.
ANY_SIZE = [name for name in NANO if name.startswith(("asmlp", "s2mlp"))]
ONE_SIZE = [name for name in NANO if name not in ANY_SIZE]
