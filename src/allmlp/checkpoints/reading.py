"""Checkpoint files read as data: tensors and plain values. No code in a file is ever run.

Three formats, told apart by what the file begins with and not by its name: PyTorch's (`.pth`, `.pt`, `.bin`; zip
archives and the older pickles), safetensors, and NumPy's `.npz`. Of a model in several files the index names them all.
"""

import argparse
import json
import mmap
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from allmlp.errors import UserError, first_line

_FORMATS = "allmlp reads PyTorch's .pth, .pt and .bin, safetensors and NumPy's .npz"
_MIB = 2**20
_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors", ".npz"}
INDEX = ".index.json"
"""How the name of an index ends."""
_INDEX_BYTES = 2**26
# As transformers numbers a model's files.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything a checkpoint file holds.

    Tensors come on the CPU. From PyTorch's files the plain containers that trainers save are read as data: yacs'
    `CfgNode` as a dictionary (yacs need not be installed), `argparse.Namespace`, NumPy scalars as Python numbers, paths
    as text, a `defaultdict` as a dictionary, NumPy arrays without their numbers.

    Args:
        path: the file, or of a model in several files their index, `….index.json`; or a directory with no other one.

    Returns:
        The names at the top and what they hold; flat for safetensors and npz.

    Raises:
        UserError: if the file is missing, empty, of another format, corrupt or cut short, claims more data than it has,
            or would run code; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_one_in(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if path.name.endswith(INDEX):
        return _read_parts(path)
    part = _part_of_several(path)
    if part:
        index = f"{path.name[: part.start()]}{path.suffix}{INDEX}"
        raise UserError(f"{path} is one of {int(part[2])} files that hold a model together: name their index, {index}.")
    return _read_file(path)


def parts_of(index: str | Path) -> dict[str, list[str]]:
    """The files of a model in several, which lie beside their index, and the names of the weights in each.

    Raises:
        UserError: if it is no index of files beside it.
    """
    index = Path(index)
    try:
        if index.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"it has more than {_INDEX_BYTES:,} bytes")
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
            raise ValueError("its weight_map names files elsewhere")
    # What is no dictionary, too, and brackets without end.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of a model's files: {first_line(error)}") from error
    parts: dict[str, list[str]] = {}
    for name, file in places.items():
        parts.setdefault(file, []).append(name)
    return parts


def _only_one_in(directory: Path) -> Path:
    files = sorted(file for file in directory.iterdir() if not file.name.startswith("."))
    whole = [file for file in files if file.suffix in _SUFFIXES and not _part_of_several(file)]
    found = whole + [file for file in files if file.name.endswith(INDEX)]
    if not found:
        raise UserError(f"{directory} is a directory without a checkpoint in it; {_FORMATS}.")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{directory} is a directory with several checkpoints in it: name one of {names}.")
    return found[0]


def _part_of_several(path: Path) -> re.Match[str] | None:
    part = _PART.search(path.name)
    return part if part and int(part[2]) > 1 else None


def _read_parts(index: Path) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for file, names in parts_of(index).items():
        path = index.parent / file
        if not path.is_file():
            raise UserError(f"There is no file {path}, which {index} names.")
        part = _read_file(path)
        if part.keys() != set(names):
            raise UserError(f"{path} does not hold the weights that {index} says.")
        contents |= part
    return contents


def _read_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"{path} is empty.")
    if start[:4] == b"PK\x03\x04":
        contents = _read_zip(path)
    elif start[8:9] == b"{" or path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    # A pickle of protocol 2 or later, as older versions of PyTorch write.
    elif start[:1] == b"\x80":
        contents = _read_torch(path)
    else:
        raise UserError(f"{path} is no checkpoint: it begins with {start!r}; {_FORMATS}.")
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise UserError(f"{path} holds a {type(contents).__name__}, not weights by name.")
    return contents


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
        # torch.save never compresses.
        if claimed > size:
            raise UserError(f"{path} is refused: it has {size:,} bytes and claims to hold {claimed:,}.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{path} is refused: it is compressed, as PyTorch's checkpoints never are.")
        return _read_torch(path, Counter(entry.file_size for entry in entries if "/data/" in entry.filename))
    if names and all(name.endswith(".npy") for name in names):
        # np.savez_compressed does, but weights barely shrink.
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
                if array.dtype.kind not in "fiub" or array.itemsize > 8:
                    raise UserError(f"{path}: {name} holds {array.dtype}, not numbers of a type that torch has.")
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
    # torch would build one of whatever size the file asks for.
    if _pickle_holds(path, b"\nbytearray\n", zipped=records is not None):
        raise UserError(f"{path} is refused: it holds a bytearray, which may claim any size.")
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in _PLAIN_CONTAINERS.items()]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            # Mapped, a tensor that claims more than its record reaches into the file, not into other memory.
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=records is not None)
        # The bytes drive the unpickler, so a broken file can raise anything.
        except Exception as error:
            raise _refusal(path, error, " ".join(str(warning.message) for warning in said)) from error
    claimed = _storage_bytes(path, contents)
    if sum(claimed.elements()) > path.stat().st_size or (records is not None and claimed - records):
        raise UserError(f"{path} is refused: its tensors claim more data than it holds.")
    return contents


def _pickle_holds(path: Path, marker: bytes, *, zipped: bool) -> bool:
    """Whether what torch would unpickle holds some bytes; where the data of tensors do is left aside in archives."""
    if zipped:
        try:
            # By torch's own reader: another one may take a broken archive for something else.
            return marker in torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        # It fails as torch.load does.
        except Exception as error:
            raise _corrupt(path, error) from error
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(marker) >= 0


def _refusal(path: Path, error: Exception, warned: str) -> UserError:
    """Why torch has not loaded a file."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return UserError(
            f"{path} is refused: to load it, '{refused[1]}' would have to be run, which is neither a tensor nor a "
            "plain container that trainers save. Save the state_dict() alone."
        )
    protocol = re.search(r"pickle protocol (\d+)", warned)
    if protocol:
        return UserError(
            f"{path} is a pickle of protocol {protocol[1]}; protocol 2, torch.save's default, alone can be read "
            "without running code. Save it again without pickle_protocol."
        )
    return _corrupt(path, error)


def _storage_bytes(path: Path, contents: Any) -> Counter[int]:
    """The sizes of all tensors' data in containers of any depth, each memory once.

    Raises:
        UserError: if a tensor has something else than data of its own.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [contents]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(
                f"{path} holds a {type(value).__name__}, the part of a weight that one process has. Save whole "
                "weights: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))."
            )
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
    text = str(error).strip()
    # torch's first line advises to run whatever the file holds; the reason stands behind it.
    text = text.partition("WeightsUnpickler error: ")[2] or text
    reason = text.splitlines()
    return UserError(f"{path} is corrupt or cut short ({reason[0] if reason else type(error).__name__}).")


class _CfgNode:
    """Stands in for yacs' `CfgNode`, a dictionary: the unpickler fills plain dictionaries only."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


class _NumpyDtype:
    """Stands in for `numpy.dtype` of numbers or text: keeps the name and the byte order."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[fiub][1248]|[US]\d{1,9}", name):
            raise ValueError(f"NumPy's type {name!r} is no number")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> Any:
    """Stand in for NumPy's rebuilding of a scalar."""
    return np.frombuffer(data, dtype.order + dtype.name, count=1)[0].item()


class _NumpyArray:
    """Stands in for `numpy.ndarray`, of which nothing is read: weights are tensors."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


def _numpy_array(*arguments: Any) -> _NumpyArray:
    """Stand in for NumPy's making of an array that is then filled."""
    return _NumpyArray()


def _path(*parts: str) -> str:
    """Stand in for pathlib's paths."""
    return str(PurePosixPath(*parts))


def _dictionary(*factory: Any) -> dict[Any, Any]:
    """Stand in for `collections.defaultdict`."""
    return {}


def _factory(*arguments: Any) -> None:
    """Stand in for what a `defaultdict` would make its values of."""
    raise ValueError("a built-in type would have to be called")


# What may be named in a file beside PyTorch's own tensors, and what is built in its place.
_PLAIN_CONTAINERS: dict[str, Any] = {
    "yacs.config.CfgNode": _CfgNode,
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": _NumpyDtype,
    "numpy.ndarray": _NumpyArray,
    # NumPy's before and since 2.0, pathlib's in Python 3.13 and in all others.
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
    **dict.fromkeys(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), _numpy_array),
    **{
        f"{module}.{pure}{system}Path": _path
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    },
    "collections.defaultdict": _dictionary,
    **{f"builtins.{name}": _factory for name in ("dict", "list", "int", "float", "str", "bool")},
}
