"""The peers: other projects' forms of the same networks, built here with the same weights."""

import importlib
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from allmlp.benchmark.networks import Logits
from allmlp.catalogue import is_language
from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One network of another project.

    Attributes:
        name: the project.
        model: allmlp's name of the network.
        module: what must be importable, or, with `checkout`, lie in the directory that is named.
        build: makes the network, dropout and stochastic depth off.
        rename: patterns and replacements that turn its parameters' names into allmlp's, applied in order; of language
            models the converter knows them.
        arguments: what gives allmlp's network the peer's epsilons; of language models what the converter is told.
        checkout: the peer cannot be installed; it is a checkout of a repository.
    """

    name: str
    model: str
    module: str
    build: Callable[[], nn.Module]
    rename: tuple[tuple[str, str], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    checkout: bool = False


class PeerMissingError(UserError):
    """A peer is not on this machine."""


def peers_of(model: str) -> list[Peer]:
    """The known peers of a model, whether they are on this machine or not."""
    return [peer for peer in PEERS if peer.model == model]


def build_pair(peer: Peer, paths: Mapping[str, Path]) -> tuple[nn.Module, nn.Module]:
    """allmlp's network and the peer's, in eval mode, both with the peer's weights.

    The weights are drawn anew, larger than an untrained network's, so that every layer shows in the output.

    Args:
        peer: the peer.
        paths: checkouts by the peer's name.

    Raises:
        PeerMissingError: if it is not installed, or no checkout of it is named.
        ValueError: if a parameter of one of the two has no counterpart.
    """
    with _importable(peer, paths):
        theirs = peer.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        with torch.no_grad():
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
            parameter.normal_(0, scale, generator=generator).add_(float(parameter.dim() == 1))
    if is_language(peer.model):
        converted = convert_state_dict(theirs.state_dict(), facts=peer.arguments)
        return Logits(converted.model).eval(), theirs.eval()
    ours = timm.create_model(peer.model, drop_path_rate=0.0, **peer.arguments)
    ours.load_state_dict(_translated(peer, theirs.state_dict(), ours.state_dict()))
    return ours.eval(), theirs.eval()


def _translated(peer: Peer, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, value in theirs.items():
        for pattern, replacement in peer.rename:
            name = re.sub(pattern, replacement, name)
        # A block's number in its stage stands behind that of the stage's first one: 5+2 is block 7.
        name = re.sub(r"(\d+)\+(\d+)", lambda sum_: str(int(sum_[1]) + int(sum_[2])), name)
        if name not in ours:
            raise ValueError(f"{peer.name} has a parameter that {peer.model} has not: {name}")
        wanted = ours[name].shape
        if peer.name == "mlp-mixer-pytorch" and name == "stem.proj.weight":
            # Its patches are unfolded in the order row, column, colour.
            value = value.reshape(wanted[0], *wanted[2:], wanted[1]).permute(0, 3, 1, 2)
        state[name] = value.reshape(wanted)
    if missing := ours.keys() - state.keys():
        raise ValueError(f"{peer.name} lacks parameters of {peer.model}: {', '.join(sorted(missing)[:3])} …")
    return state


@contextmanager
def _importable(peer: Peer, paths: Mapping[str, Path]) -> Iterator[None]:
    if not peer.checkout:
        try:
            importlib.import_module(peer.module)
        except ImportError as error:
            raise PeerMissingError(f"{peer.name} is not installed: pip install {peer.name}") from error
        yield
        return
    if peer.name not in paths:
        raise PeerMissingError(f"{peer.name} needs a checkout of its repository: --peer-path {peer.name}=DIRECTORY")
    path = Path(paths[peer.name]).resolve()
    if not (path / peer.module).is_file():
        raise PeerMissingError(f"{path} is no checkout of {peer.name}: it has no {peer.module}")
    before = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        with warnings.catch_warnings():
            # Official code imports timm by the names of its day.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        sys.path.remove(str(path))
        # Every research repository calls its package `models`.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == Path(peer.module).parts[0]:
                del sys.modules[name]


def checkouts(named: Mapping[str, str | Path]) -> dict[str, Path]:
    """Checked `--peer-path` values.

    Raises:
        UserError: for a name that is no peer's, or a path that is no directory.
    """
    known = {peer.name for peer in PEERS if peer.checkout}
    for name, path in named.items():
        if name not in known:
            raise UserError(f"no peer {name!r} is measured from a checkout.{nearest(name, known)}")
        if not Path(path).is_dir():
            raise UserError(f"the checkout of {name} is no directory: {path}")
    return {name: Path(path) for name, path in named.items()}


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, drop_path_rate=0.0)


def _lucidrains_gmlp() -> nn.Module:
    from g_mlp_pytorch import gMLPVision

    return gMLPVision(image_size=224, patch_size=16, num_classes=1000, dim=256, depth=30, ff_mult=6)


def _lucidrains_text(depth: int, attention: int | None = None) -> Callable[[], nn.Module]:
    """The paper's base sizes (appendix C), with the dense weights and the head of its own that this project has."""

    def build() -> nn.Module:
        from g_mlp_pytorch import gMLP

        return gMLP(num_tokens=32_000, dim=512, depth=depth, seq_len=512, ff_mult=6, causal=True, attn_dim=attention)

    return build


def _lucidrains_mixer() -> nn.Module:
    from mlp_mixer_pytorch import MLPMixer

    # Its two factors have the opposite meaning of their names: the first one widens the tokens.
    return MLPMixer(
        image_size=224, channels=3, patch_size=16, dim=768, depth=12, num_classes=1000,
        expansion_factor=0.5, expansion_factor_token=4,
    )  # fmt: skip


def _official_vip() -> nn.Module:
    return importlib.import_module("models.vip").vip_s7()


def _official_asmlp() -> nn.Module:
    # Its shift is a CuPy kernel; here the plain form of the paper's listing takes its place, which runs everywhere.
    kernel = types.ModuleType("models.shift_cuda")
    kernel.Shift = _PlainShift  # type: ignore[attr-defined]
    _register_package("models", {"models.shift_cuda": kernel})
    return importlib.import_module("models.as_mlp").AS_MLP(drop_path_rate=0.0)


def _register_package(name: str, modules: Mapping[str, types.ModuleType]) -> None:
    """Let modules of a checkout's package be imported without running its `__init__`, some of them replaced."""
    package = types.ModuleType(name)
    package.__path__ = [str(Path(sys.path[0]) / name)]
    sys.modules.update({name: package, **modules})


class _PlainShift(nn.Module):
    """AS-MLP's shift of `shift_size` channel groups along `dim`, by padding, rolling and concatenating."""

    def __init__(self, shift_size: int, dim: int) -> None:
        super().__init__()
        self.shift_size, self.dim = shift_size, dim

    def forward(self, x: Tensor) -> Tensor:
        pad = self.shift_size // 2
        parts = F.pad(x, (pad, pad, pad, pad)).chunk(self.shift_size, 1)
        moved = [part.roll(offset, self.dim) for part, offset in zip(parts, range(-pad, pad + 1), strict=True)]
        return torch.cat(moved, 1)[:, :, pad:-pad, pad:-pad]


def _jittor_s2mlpv2() -> nn.Module:
    """Jittor-MLP's network with the paper's hidden width, mean and final norm, and shifts that read the unshifted."""
    # What its package imports on the way needs CuPy; this one module needs nothing of it but `pair`.
    utilities = types.ModuleType("models_pytorch.utils")
    utilities.pair = to_2tuple  # type: ignore[attr-defined]
    _register_package("models_pytorch", {"models_pytorch.utils": utilities})
    source = importlib.import_module("models_pytorch.s2_mlp_v2")
    for name in ("spatial_shift1", "spatial_shift2"):
        setattr(source, name, _out_of_place(getattr(source, name)))
    model = source.S2MLPv2()
    for stage, positions in zip(model.stages, (32 * 32, 16 * 16), strict=True):
        for module in stage.modules():
            if isinstance(module, source.SplitAttention):
                module.mlp1 = _MeanLinear(module.channel, module.channel // 4, bias=False)
                module.mlp1.positions = positions
                module.mlp2 = nn.Linear(module.channel // 4, module.channel * module.k, bias=False)
    model.stages.append(_NormOfMap(384))
    return model


def _out_of_place(shift: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same slice assignments on a copy, each reading the values from before the shift."""

    class Reader:
        """Takes assignments to a copy and gives values of the original."""

        def __init__(self, x: Tensor) -> None:
            self.original, self.copy = x, x.clone()

        def size(self) -> torch.Size:
            return self.original.size()

        def __getitem__(self, index: Any) -> Tensor:
            return self.original[index]

        def __setitem__(self, index: Any, value: Tensor) -> None:
            self.copy[index] = value

    return lambda x: shift(Reader(x)).copy  # type: ignore[arg-type, attr-defined]


class _MeanLinear(nn.Linear):
    """A linear map of a sum over `positions`, taken as the mean."""

    positions = 1

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / self.positions)


class _NormOfMap(nn.LayerNorm):
    """Layer norm over the channels of an NCHW map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_CAUSAL = {"causal": True, "gate_act": "none"}
_VIP_BLOCKS = {0: 0, 2: 5, 3: 8, 4: 16}

PEERS: tuple[Peer, ...] = (
    Peer(
        name="timm",
        model="gmlp_small_patch16_224",
        module="timm",
        build=_timm("gmlp_s16_224"),
        rename=(
            (r"mlp_channels\.gate\.proj", "sgu"),
            (r"mlp_channels\.gate", "sgu"),
            (r"mlp_channels\.fc1", "proj_in"),
            (r"mlp_channels\.fc2", "proj_out"),
        ),
    ),
    Peer(
        name="g-mlp-pytorch",
        model="gmlp_small_patch16_224",
        module="g_mlp_pytorch",
        build=_lucidrains_gmlp,
        rename=(
            (r"^to_patch_embed\.1", "stem.proj"),
            (r"^layers\.(\d+)\.fn\.", r"blocks.\1."),
            (r"fn\.proj_in\.0", "proj_in"),
            (r"\.fn\.", "."),
            (r"^to_logits\.0", "norm"),
            (r"^to_logits\.2", "head"),
        ),
        arguments={"norm_eps": 1e-5},
    ),
    Peer(
        name="g-mlp-pytorch",
        model="gmlp_base",
        module="g_mlp_pytorch",
        build=_lucidrains_text(depth=48),
        arguments=_CAUSAL,
    ),
    Peer(
        name="g-mlp-pytorch",
        model="amlp_base",
        module="g_mlp_pytorch",
        build=_lucidrains_text(depth=36, attention=64),
        arguments=_CAUSAL,
    ),
    Peer(
        name="timm",
        model="mixer_base_patch16_224",
        module="timm",
        build=_timm("mixer_b16_224"),
    ),
    Peer(
        name="mlp-mixer-pytorch",
        model="mixer_base_patch16_224",
        module="mlp_mixer_pytorch",
        build=_lucidrains_mixer,
        rename=(
            (r"^1\.", "stem.proj."),
            (r"^14\.", "norm."),
            (r"^16\.", "head."),
            (r"^(\d+)\.0\.fn\.0", r"\1.mlp_tokens.fc1"),
            (r"^(\d+)\.0\.fn\.3", r"\1.mlp_tokens.fc2"),
            (r"^(\d+)\.1\.fn\.0", r"\1.mlp_channels.fc1"),
            (r"^(\d+)\.1\.fn\.3", r"\1.mlp_channels.fc2"),
            (r"^(\d+)\.0\.norm", r"\1.norm1"),
            (r"^(\d+)\.1\.norm", r"\1.norm2"),
            *((rf"^{index + 2}\.", f"blocks.{index}.") for index in range(12)),
        ),
        arguments={"norm_eps": 1e-5},
    ),
    Peer(
        name="timm",
        model="resmlp_12_patch16_224",
        module="timm",
        build=_timm("resmlp_12_224"),
    ),
    Peer(
        name="VisionPermutator",
        model="vip_small_patch7_224",
        module="models/vip.py",
        build=_official_vip,
        rename=(
            (r"^patch_embed", "stem"),
            (r"^network\.1\.proj", "blocks.4.proj"),
            *((rf"^network\.{stage}\.(\d+)\.", f"blocks.{first}+\\1.") for stage, first in _VIP_BLOCKS.items()),
        ),
        checkout=True,
    ),
    Peer(
        name="AS-MLP",
        model="asmlp_tiny_patch4_224",
        module="models/as_mlp.py",
        build=_official_asmlp,
        rename=(
            (r"^patch_embed", "stem"),
            *(
                (rf"^layers\.{stage}\.blocks\.(\d+)\.", f"blocks.{first}+\\1.")
                for stage, first in enumerate((0, 3, 6, 13))
            ),
            *((rf"^layers\.{stage}\.downsample\.", f"blocks.{index}.") for stage, index in enumerate((2, 5, 12))),
        ),
        checkout=True,
    ),
    Peer(
        name="Jittor-MLP",
        model="s2mlpv2_small_patch7_224",
        module="models_pytorch/s2_mlp_v2.py",
        build=_jittor_s2mlpv2,
        rename=(
            (r"^stages\.0\.0", "stem.proj"),
            (r"^stages\.1\.0", "blocks.4.proj"),
            (r"^stages\.2", "norm"),
            (r"^mlp_head\.1", "head"),
            *((rf"^stages\.{stage}\.1\.model\.(\d+)\.", f"blocks.{first}+\\1.") for stage, first in enumerate((0, 5))),
            (r"^(blocks\.[\d+]+)\.0\.norm", r"\1.norm1"),
            (r"^(blocks\.[\d+]+)\.1\.norm", r"\1.norm2"),
            (r"^(blocks\.[\d+]+)\.0\.fn\.mlp1", r"\1.attn.expand"),
            (r"^(blocks\.[\d+]+)\.0\.fn\.mlp2", r"\1.attn.proj"),
            (r"^(blocks\.[\d+]+)\.0\.fn\.split_attention\.mlp(\d)", r"\1.attn.split_attention.fc\2"),
            (r"^(blocks\.[\d+]+)\.1\.fn\.0", r"\1.mlp_channels.fc1"),
            (r"^(blocks\.[\d+]+)\.1\.fn\.3", r"\1.mlp_channels.fc2"),
        ),
        checkout=True,
    ),
)
