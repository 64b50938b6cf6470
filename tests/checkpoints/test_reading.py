import argparse
import functools
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from allmlp.checkpoints.reading import read_checkpoint
from allmlp.errors import UserError
from tests.checkpoints.parity import GOLDEN

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


def legacy(weights: Any, path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def npz(weights: Any, path: Path, save: Callable[..., None] = np.savez) -> None:
    with path.open("wb") as file:
        save(file, **{name: np.asarray(array) for name, array in weights.items()})


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        legacy,
        save_file,
        npz,
        functools.partial(npz, save=np.savez_compressed),
    ],
    ids=["torch", "torch before 1.6", "safetensors", "npz", "npz compressed"],
)
def test_the_format_is_seen_whatever_the_name(write: Callable[[Any, Path], None], path: Path) -> None:
    write(WEIGHTS, path)
    contents = read_checkpoint(path)
    assert contents.keys() == WEIGHTS.keys()
    assert all(torch.equal(contents[name], WEIGHTS[name]) for name in WEIGHTS)


class TestPlainContainers:
    def test_numpy_scalars_and_namespaces_are_data(self, path: Path) -> None:
        numbers = [np.float64(0.1), np.float32(0.5), np.int64(-7), np.bool_(True), np.dtype(">f8").type(2.5)]
        torch.save({"model": WEIGHTS, "best": numbers, "args": argparse.Namespace(lr=np.float64(1e-3))}, path)
        contents = read_checkpoint(path)
        assert contents["best"] == [0.1, 0.5, -7, True, 2.5]
        assert [type(number) for number in contents["best"]] == [float, float, int, bool, float]
        assert contents["args"].lr == 1e-3

    def test_a_configuration_of_yacs_needs_no_yacs(self) -> None:
        assert "yacs" not in sys.modules
        contents = read_checkpoint(GOLDEN / "as_mlp_shift5" / "checkpoint.pth")
        assert type(contents["config"]) is OrderedDict
        assert contents["config"]["MODEL"]["ASMLP"]["SHIFT_SIZE"] == 5
        assert "yacs" not in sys.modules

    def test_what_torch_may_load_is_as_before(self, path: Path) -> None:
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(GOLDEN / "as_mlp_shift5" / "checkpoint.pth")
        assert set(torch.serialization.get_safe_globals()) == before

    def test_companions_of_weights_are_harmless(self, path: Path) -> None:
        nested = defaultdict(list, {"a": [1]})
        companions = {"history": np.zeros(3), "names": np.array(["a"]), "out": Path("/runs/a"), "log": nested}
        torch.save({"model": WEIGHTS, "args": argparse.Namespace(**companions)}, path)
        contents = read_checkpoint(path)
        assert torch.equal(contents["model"]["a.weight"], WEIGHTS["a.weight"])
        assert (contents["args"].out, contents["args"].log) == ("/runs/a", {"a": [1]})
        assert not isinstance(contents["args"].history, np.ndarray)

    def test_what_makes_the_values_of_a_dictionary_is_not_called(self, path: Path) -> None:
        path.write_bytes(zipped(b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nlist\n)Rs."))
        with pytest.raises(UserError, match="a built-in type would have to be called"):
            read_checkpoint(path)


class Trap:
    """Unpickled by an ordinary unpickler it creates the file it was made with."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduction = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduction


def traps(file: Path) -> dict[str, Trap]:
    return {
        "mkdir": Trap(os.mkdir, str(file)),
        "eval": Trap(eval, f"__import__('os').mkdir({str(file)!r})"),
        "path": Trap(Path.touch, Path(file)),
        "numpy": Trap(np.save, str(file), 1),
    }


class TestNothingIsRun:
    @pytest.mark.parametrize("kind", ["mkdir", "eval", "path", "numpy"])
    @pytest.mark.parametrize("save", [torch.save, legacy], ids=["zip", "pickle"])
    def test_a_trap_does_not_go_off(self, kind: str, save: Callable[[Any, Path], None], tmp_path: Path) -> None:
        mark = tmp_path / "mark.npy"
        checkpoint = tmp_path / "checkpoint.pth"
        save({"state_dict": WEIGHTS, "epoch": traps(mark)[kind]}, checkpoint)
        with pytest.raises(UserError, match=r"checkpoint\.pth is refused: to load it, '.*' would have to be run"):
            read_checkpoint(checkpoint)
        assert not mark.exists()
        # And it is a trap.
        torch.load(checkpoint, weights_only=False)
        assert mark.exists()

    def test_a_trap_in_a_plain_pickle_does_not_go_off(self, tmp_path: Path) -> None:
        mark, checkpoint = tmp_path / "mark", tmp_path / "checkpoint.pkl"
        for protocol in (2, pickle.HIGHEST_PROTOCOL):
            checkpoint.write_bytes(pickle.dumps({"weights": traps(mark)["mkdir"]}, protocol))
            with pytest.raises(UserError):
                read_checkpoint(checkpoint)
            assert not mark.exists()

    def test_a_trap_in_an_archive_of_arrays_does_not_go_off(self, tmp_path: Path) -> None:
        mark, checkpoint = tmp_path / "mark", tmp_path / "checkpoint.npz"
        np.savez(checkpoint, a=np.array([traps(mark)["mkdir"]], dtype=object))
        with pytest.raises(UserError, match="pickled Python objects"):
            read_checkpoint(checkpoint)
        assert not mark.exists()
        np.load(checkpoint, allow_pickle=True)["a"]
        assert mark.exists()

    def test_stand_ins_take_nothing_but_data(self, path: Path) -> None:
        """A NumPy scalar of Python objects would have been another way in."""
        path.write_bytes(zipped(b"cnumpy\ndtype\n(X\x03\x00\x00\x00O64tR."))
        with pytest.raises(UserError, match="no number"):
            read_checkpoint(path)

    def test_a_size_in_place_of_data_takes_no_memory(self, path: Path) -> None:
        """torch allows bytearray, which makes one of any size, and tensors of a size, which have no data."""
        gibibyte = struct.pack("<i", 2**30)
        path.write_bytes(zipped(b"\x80\x02c__builtin__\nbytearray\nJ" + gibibyte + b"\x85R."))
        with pytest.raises(UserError, match=r"checkpoint\.pth is refused: it holds a bytearray"):
            read_checkpoint(path)
        path.write_bytes(zipped(b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\nJ" + gibibyte + b"\x85Rs."))
        with pytest.raises(UserError, match="its tensors claim more data than it holds"):
            read_checkpoint(path)

    def test_the_numbers_of_a_tensor_may_look_like_anything(self, path: Path) -> None:
        numbers = torch.frombuffer(bytearray(b"c__builtin__\nbytearray\nJ"), dtype=torch.uint8)
        torch.save({"a": numbers}, path)
        assert torch.equal(read_checkpoint(path)["a"], numbers)

    @pytest.mark.parametrize("numbers", [7, 2**20, 2**30])
    def test_a_tensor_cannot_reach_beyond_its_file(self, path: Path, numbers: int) -> None:
        torch.save({"a": torch.arange(6.0)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                claimed = content.replace(b"K\x06", b"J" + struct.pack("<i", numbers))
                archive.writestr(entry, claimed if entry.endswith("data.pkl") else content)
        with pytest.raises(UserError, match=r"checkpoint\.pth is (corrupt|refused)"):
            read_checkpoint(path)

    def test_a_program_of_torchscript_is_refused(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"")
            archive.writestr("archive/code/__torch__.py", b"")
        with pytest.raises(UserError, match="TorchScript program"):
            read_checkpoint(path)


def zipped(data: bytes) -> bytes:
    """A checkpoint with this pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else old.read(entry))
    return result.getvalue()


class TestBrokenFiles:
    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no file .*nothing\.pth"):
            read_checkpoint(tmp_path / "nothing.pth")
        with pytest.raises(UserError, match="is a directory without a checkpoint in it; allmlp reads"):
            read_checkpoint(tmp_path)

    def test_several_in_a_directory(self, tmp_path: Path) -> None:
        for name in ("best.pth", "last.pth", "config.json"):
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"several checkpoints in it: name one of best\.pth, last\.pth\."):
            read_checkpoint(tmp_path)

    def test_an_empty_one(self, path: Path) -> None:
        path.touch()
        with pytest.raises(UserError, match=r"checkpoint\.pth is empty"):
            read_checkpoint(path)

    @pytest.mark.parametrize("content", [b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0"])
    def test_one_of_another_kind(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no checkpoint: it begins with"):
            read_checkpoint(path)

    def test_another_zip_archive(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "")
        with pytest.raises(UserError, match=r"no checkpoint: it holds word/document\.xml"):
            read_checkpoint(path)

    def test_one_that_holds_no_names(self, path: Path) -> None:
        torch.save([torch.zeros(2)], path)
        with pytest.raises(UserError, match="holds a list, not weights by name"):
            read_checkpoint(path)
        torch.save({1: torch.zeros(2)}, path)
        with pytest.raises(UserError, match="not weights by name"):
            read_checkpoint(path)

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
    @pytest.mark.parametrize("suffix", ["pth", "legacy", "safetensors", "npz"])
    def test_one_cut_short(self, tmp_path: Path, suffix: str, share: float) -> None:
        path = tmp_path / f"checkpoint.{suffix}"
        write = {
            "pth": torch.save,
            "legacy": legacy,
            "safetensors": save_file,
            "npz": npz,
        }[suffix]
        write(WEIGHTS, path)
        content = path.read_bytes()
        path.write_bytes(content[: max(1, int(len(content) * share))])
        with pytest.raises(UserError, match=r"checkpoint\.\w+ is (corrupt or cut short|no checkpoint)"):
            read_checkpoint(path)

    def test_any_byte_may_be_wrong(self, path: Path) -> None:
        torch.save(WEIGHTS, path)
        content = path.read_bytes()
        for position in range(0, len(content), 23):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
            try:
                read_checkpoint(path)
            except UserError:
                continue

    def test_a_header_of_exabytes(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        path.write_bytes(struct.pack("<Q", 2**62) + b'{"a":')
        with pytest.raises(UserError, match="corrupt or cut short"):
            read_checkpoint(path)
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UserError, match="corrupt or cut short"):
            read_checkpoint(path)

    def test_an_array_of_exabytes(self, path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**58,)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", header.getvalue())
        with pytest.raises(UserError, match="corrupt or cut short"):
            read_checkpoint(path)

    def test_one_of_another_protocol(self, path: Path) -> None:
        torch.save(WEIGHTS, path, pickle_protocol=4)
        with pytest.raises(UserError, match=r"a pickle of protocol 4; .*Save it again without pickle_protocol"):
            read_checkpoint(path)

    def test_arrays_of_another_byte_order(self, path: Path) -> None:
        npz({"a": np.arange(3, dtype=">f4")}, path)
        assert torch.equal(read_checkpoint(path)["a"], torch.arange(3.0))

    def test_arrays_of_longer_numbers(self, path: Path) -> None:
        npz({"a": np.zeros(3, dtype=np.longdouble)}, path)
        with pytest.raises(UserError, match=r"a holds float\d+, not numbers of a type that torch has"):
            read_checkpoint(path)

    def test_arrays_of_text(self, path: Path) -> None:
        npz({"a": np.array(["text"])}, path)
        with pytest.raises(UserError, match="a holds <U4, not numbers"):
            read_checkpoint(path)

    def test_a_compressed_one(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(range(256)))
        with pytest.raises(UserError, match="compressed, as PyTorch's checkpoints never are"):
            read_checkpoint(path)

    @pytest.mark.parametrize(("name", "mebibytes"), [("archive/data.pkl", 2), ("a.npy", 300)])
    def test_an_archive_that_swells(self, path: Path, name: str, mebibytes: int) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as entry:
            for _ in range(mebibytes):
                entry.write(bytes(2**20))
        assert path.stat().st_size < 2**20
        with pytest.raises(UserError, match=rf"it has [\d,]+ bytes and claims to hold {mebibytes * 2**20:,}\."):
            read_checkpoint(path)


def test_weights_spread_over_processes_are_refused_by_name(path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.save({name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in WEIGHTS.items()}, path)
        with pytest.raises(UserError, match="holds a DTensor, the part of a weight that one process has"):
            read_checkpoint(path)
    finally:
        dist.destroy_process_group()


class TestSeveralFiles:
    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        files = {name: f"model-0000{part}-of-00002.safetensors" for part, name in enumerate(WEIGHTS, 1)}
        for name, file in files.items():
            save_file({name: WEIGHTS[name]}, tmp_path / file)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return index

    @pytest.mark.parametrize("by_directory", [False, True], ids=["index", "directory"])
    def test_they_are_read_by_their_index(self, index: Path, by_directory: bool) -> None:
        contents = read_checkpoint(index.parent if by_directory else index)
        assert contents.keys() == WEIGHTS.keys()
        assert all(torch.equal(contents[name], WEIGHTS[name]) for name in WEIGHTS)

    def test_one_alone_is_no_model(self, index: Path) -> None:
        with pytest.raises(UserError, match=r"one of 2 files .*: name their index, model\.safetensors\.index\.json"):
            read_checkpoint(index.with_name("model-00001-of-00002.safetensors"))

    def test_a_single_one_may_be_numbered(self, tmp_path: Path) -> None:
        save_file(WEIGHTS, tmp_path / "model-00001-of-00001.safetensors")
        assert read_checkpoint(tmp_path / "model-00001-of-00001.safetensors").keys() == WEIGHTS.keys()

    def test_one_too_few_is_named(self, index: Path) -> None:
        index.with_name("model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match=r"no file .*model-00002-of-00002\.safetensors, which .*index\.json names"):
            read_checkpoint(index)

    def test_files_hold_what_the_index_says(self, index: Path) -> None:
        save_file({"b": torch.ones(2)}, index.with_name("model-00002-of-00002.safetensors"))
        with pytest.raises(UserError, match=r"00002\.safetensors does not hold the weights that .*index\.json says"):
            read_checkpoint(index)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}']
    )
    def test_an_index_that_is_none(self, index: Path, text: str) -> None:
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is no index of a model's files"):
            read_checkpoint(index)
