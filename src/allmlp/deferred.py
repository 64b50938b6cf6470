"""An import that waits for another one."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(trigger: str, module: str) -> None:
    """Import `module` once `trigger` has been imported, which may be now.

    It is imported when the outermost import within the trigger's package and its own is done, and so finds nothing in
    either that is only half initialised.

    Args:
        trigger: name of a module.
        module: name of a module that imports the trigger or its siblings.
    """
    if trigger in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Watch(trigger, module))


class _Watch(MetaPathFinder):
    """Finds the modules of two packages where the other finders find them, and sees when they have been executed."""

    def __init__(self, trigger: str, module: str) -> None:
        self.trigger, self.module = trigger, module
        self.packages = {name.partition(".")[0] for name in (trigger, module)}
        self.depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        # Those in front have been asked.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            # An attribute of this one loader, which else stays what other tools expect.
            spec.loader.exec_module = lambda module: self._execute(execute, module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        if self.depth == 0 and self.trigger in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module(self.module)
