"""Checkpoint files read as data: tensors and plain values. No code in a file is ever run.

Three formats, told apart by what the file begins with and not by its name: PyTorch's (`.pth`, `.pt`, `.bin`; zip
archives and the older pickles), safetensors, and NumPy's `.npz`.
"""

import argparse
import json
import mmap
import re
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from allmlp.errors import UserError, first_line

_FORMATS = "allmlp reads PyTorch's .pth, .pt and .bin, safetensors and NumPy's .npz"
_MIB = 2**20
_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
INDEX = ".safetensors.index.json"
"""How the index of a checkpoint in several files ends."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything a checkpoint file holds.

    Tensors come on the CPU. From PyTorch's files the plain containers that trainers save are read as data: yacs'
    `CfgNode` and default dictionaries as dictionaries (yacs need not be installed), `argparse.Namespace`, NumPy scalars
    as Python numbers, paths as text.

    Args:
        path: The file; of a checkpoint in several safetensors files the index, `….safetensors.index.json`.

    Returns:
        The names at the top and what they hold; flat for safetensors and npz.

    Raises:
        UserError: The file is missing, empty, of another format, corrupt or cut short, claims more data than it has, or
            would run code; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name the checkpoint file in it.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if path.name.endswith(INDEX):
        return {name: tensor for shard in shards_of(path) for name, tensor in _read_safetensors(shard).items()}
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", path.name):
        raise UserError(f"{path} is one of several files of a checkpoint; name their index, such as model{INDEX}.")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"{path} is empty.")
    if start[:4] == b"PK\x03\x04":
        contents = _read_zip(path)
    elif start[8:9] == b"{" or path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    # a pickle of protocol 2 or later, as older versions of PyTorch write
    elif start[:1] == b"\x80":
        contents = _read_torch(path)
    else:
        raise UserError(f"{path} is no checkpoint: it begins with {start!r}; {_FORMATS}.")
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise UserError(f"{path} holds a {type(contents).__name__}, not weights by name.")
    return contents


def shards_of(index: Path) -> list[Path]:
    """The files that an index of safetensors names; they lie beside it.

    Raises:
        UserError: It is no such index, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files: {first_line(error)}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or len(shards) < len(names) or not names:
        raise UserError(f"{index} names files that do not lie beside it: {', '.join(missing or names) or 'none'}.")
    return shards


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # A broken directory can fail anywhere in zipfile's parser.
    except Exception as error:
        raise _corrupt(path, error) from error
    names = [entry.filename for entry in entries]
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if any(name.endswith("/data.pkl") for name in names):
        if any("/code/" in name for name in names):
            raise UserError(f"{path} is a TorchScript program, not weights; save the model's state_dict().")
        # torch.save never compresses
        if claimed > size:
            raise UserError(f"{path} is refused: it has {size:,} bytes and claims to hold {claimed:,}.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{path} is refused: it is compressed, as PyTorch's checkpoints never are.")
        return _read_torch(path, Counter(entry.file_size for entry in entries if "/data/" in entry.filename))
    if names and all(name.endswith(".npy") for name in names):
        # np.savez_compressed does, but weights barely shrink
        if claimed > max(20 * size, 256 * _MIB):
            raise UserError(f"{path} is refused: it has {size:,} bytes and claims to hold {claimed:,}.")
        return _read_npz(path)
    raise UserError(f"{path} is a zip archive, but no checkpoint: it holds {', '.join(names[:3])}; {_FORMATS}.")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise _corrupt(path, error) from error


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind not in "fiub":
                    raise UserError(f"{path}: {name} holds {array.dtype}, not numbers.")
                tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except UserError:
        raise
    # A broken member can fail anywhere in zipfile's and numpy's parsers.
    except Exception as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} is refused: it holds pickled Python objects, which would have to be run."
            ) from error
        raise _corrupt(path, error) from error
    return tensors


def _read_torch(path: Path, records: Counter[int] | None = None) -> Any:
    """What PyTorch saved; of a zip archive the sizes of the records are given, each the data of a tensor."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # torch would build one of whatever size the file asks for
        if content.find(b"\nbytearray\n") >= 0:
            raise UserError(f"{path} is refused: it holds a bytearray, which may claim any size.")
    try:
        # mapped, a tensor that claims more than its record reaches into the file, not into other memory
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _PLAIN_CONTAINERS.items()]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=records is not None)
    # The bytes drive the unpickler, so a broken file can raise anything.
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: to load it, '{refused[1]}' would have to be run, which is neither a tensor nor a "
                "plain container that trainers save. Save the state_dict() alone."
            ) from error
        raise _corrupt(path, error) from error
    claimed = _storage_bytes(contents, path)
    if sum(claimed.elements()) > path.stat().st_size or (records is not None and claimed - records):
        raise UserError(f"{path} is refused: its tensors claim more data than it holds.")
    return contents


def _storage_bytes(contents: Any, path: Path) -> Counter[int]:
    """The sizes of all tensors' data in containers of any depth, each memory once.

    Raises:
        UserError: A tensor is of a class of its own, which keeps its data elsewhere.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [contents]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise UserError(f"{path} is refused: it holds a {type(value).__name__}; save the full state dict instead.")
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, argparse.Namespace):
            left += vars(value).values()
    return Counter(filter(None, storages.values()))


def _corrupt(path: Path, error: BaseException) -> UserError:
    text = str(error).strip() or type(error).__name__
    # torch's first line advises to run whatever the file holds; the reason stands behind it
    text = text.partition("WeightsUnpickler error: ")[2] or text
    reason = text.splitlines()
    return UserError(f"{path} is corrupt or cut short ({reason[0] if reason else type(error).__name__}).")


class _CfgNode:
    """Stands in for yacs' `CfgNode`, a dictionary: the unpickler fills plain dictionaries only."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


class _NumpyDtype:
    """Stands in for `numpy.dtype` of a number: keeps the name and the byte order."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[fiub][1248]", name):
            raise ValueError(f"a NumPy scalar of type {name!r} is no number")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> Any:
    """Stands in for NumPy's rebuilding of a scalar."""
    return np.frombuffer(data, dtype.order + dtype.name, count=1)[0].item()


class _Opaque:
    """Stands in for what is no weight and never asked for: it takes what it is given and keeps nothing."""

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _DefaultDict:
    """Stands in for `collections.defaultdict`, as `_CfgNode` for a dictionary."""

    def __new__(cls, factory: Any = None) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


def _path(*parts: str) -> str:
    """Stands in for a path."""
    return "/".join(parts)


# What may be named in a file beside PyTorch's own tensors, and what is built in its place.
_PLAIN_CONTAINERS: dict[str, Any] = {
    "yacs.config.CfgNode": _CfgNode,
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.ndarray": _Opaque,
    "numpy.core.multiarray._reconstruct": _Opaque,
    "numpy._core.multiarray._reconstruct": _Opaque,
    "collections.defaultdict": _DefaultDict,
    **{f"builtins.{kind}": _Opaque for kind in ("dict", "list", "int", "float")},
    **{f"{module}.{kind}": _path for module in ("pathlib", "pathlib._local") for kind in _PATHS},
}
