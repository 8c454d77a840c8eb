"""Runs the code of its first argument, in which an import finds what the base install brings and nothing else."""

import sys

# What torch, numpy and triton ask for themselves (pip install torch, in an empty environment), and this package.
_TORCH = ("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions")
_FOUND = {"stable_rlhf", "torch", "torchgen", "functorch", "numpy", "triton", *_TORCH, *sys.stdlib_module_names}


class Light:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in _FOUND:
            return None
        return self.finder.find_spec(name, path, target)


sys.path.pop(0)  # this folder
for name in [n for n in sys.modules if n.partition(".")[0] not in _FOUND and not n.startswith("_")]:
    del sys.modules[name]
sys.meta_path[:] = [Light(finder) for finder in sys.meta_path]
code = compile(sys.argv.pop(1), "light install", "exec")
exec(code, {"__name__": "__main__"})
