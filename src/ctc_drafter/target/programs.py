"""Modules and C++ compiled ahead of time for one machine, kept on disk: a later process loads them in a moment.

A program holds code alone. Its weights stay where they are, in the modules of this process, so that the same program
serves every model of the same shape, and the next process finds it by what it depends on: see `key_of`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from ..environment import processor
from .joint import JointLinears

OPTIONS = {"aot_inductor.package_constants_in_so": False}
MAX_KEPT = 64
"""Programs on disk; beyond that, the one that was not used for the longest time goes."""


class Program:
    """A compiled `module.forward` whose arguments are flat tensors; returns a list of flat tensors."""

    def __init__(self, path: Path, module: nn.Module, *, found: bool) -> None:
        """found: whether the file was there already.

        Raises RuntimeError if it is damaged or asks for weights that the module does not have.
        """
        self.path, self.found = path, found
        loaded: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for prefix, part in module.named_modules():
            if isinstance(part, JointLinears):
                own |= {f"{prefix}.{name}": weight for name, weight in part.loaded().items()}
        self._weights = {name: own[name].detach() for name in loaded.get_constant_fqns()}
        loaded.load_constants(self._weights, check_full_update=True, user_managed=True)
        # Beneath the public call, which parses a description of the arguments each time.
        self.run = loaded.loader.boxed_run
        self._loaded = loaded


def program(
    module: nn.Module, arguments: Sequence[torch.Tensor], dynamic: Sequence[dict[int, Any] | None], key: str
) -> Program:
    """Load the program of this key, or compile `module(*arguments)` and keep it.

    dynamic: for each argument, which of its axes may have other sizes. Raises whatever torch raises.
    """
    path = folder() / f"{key}.pt2"
    if path.exists():
        try:
            made = Program(path, module, found=True)
            os.utime(path)
            return made
        except (RuntimeError, KeyError, OSError):
            path.unlink(missing_ok=True)  # cut off or of another build: made again
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        made_at = Path(aside) / path.name
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's about its own
            exported = torch.export.export(
                module, tuple(a.clone() for a in arguments), dynamic_shapes=(tuple(dynamic),), strict=False
            )
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(made_at), inductor_configs=dict(OPTIONS)
            )
        os.replace(made_at, path)
    _prune(path.parent)
    return Program(path, module, found=False)


def library(source: Path, flags: Sequence[str], *, make: bool) -> ctypes.CDLL | None:
    """What a C++ file compiles to, if it was compiled here before; with `make` it is compiled now, which takes seconds.

    flags: for the compiler, after torch's own. Raises whatever torch raises where it cannot be compiled.
    """
    code = source.read_text(encoding="utf-8")
    about = [torch.__version__, processor(), code, list(flags)]
    path = folder() / f"{source.stem}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.so"
    if _is_ours(path):
        with contextlib.suppress(OSError):  # cut off: made again
            return ctypes.CDLL(str(path))
    if not make:
        return None
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpp_builder import is_gcc

    vectorized = ["-ftree-loop-vectorize"] if is_gcc() else []  # which torch switches off there
    made: Any = CppCodeCache.load(code, extra_flags=(*flags, *vectorized))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        copy = Path(shutil.copy(made._name, Path(aside) / path.name))
        copy.chmod(0o755)
        os.replace(copy, path)
    loaded: ctypes.CDLL = made
    return loaded


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put the file there: it is loaded without being asked for."""
    try:
        found = path.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def folder() -> Path:
    """Where programs are kept: beside torch's own kernels (TORCHINDUCTOR_CACHE_DIR)."""
    return Path(cache_dir()) / "ctc_drafter"


def key_of(sources: Iterable[Any], *facts: Any) -> str:
    """What a program depends on, as a short name: torch, transformers, this machine, the facts, the classes' code."""
    cpu = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    about = [torch.__version__, transformers.__version__, platform.machine(), cpu, torch.get_num_threads()]
    files = sorted({inspect.getsourcefile(source) or "" for source in sources})
    code = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files if name]
    content = json.dumps([about, code, facts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _prune(where: Path) -> None:
    kept = sorted(where.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-MAX_KEPT]:
        path.unlink(missing_ok=True)
