"""Images to maps of patch embeddings, and maps to coarser maps."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import PatchEmbed, resample_patch_embed
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from allmlp.errors import shown
from allmlp.layers.recomputing import is_watched, mapped
from allmlp.ops.products import multiplies_in_float32, multiply


class PatchEmbedding(PatchEmbed):
    """timm's patch embedding with channels last: a convolution with stride `patch_size`, then a norm.

    Args:
        img_size: image size in pixels, one number or (height, width).
        patch_size: patch size in pixels, one number or (height, width).
        in_chans: channels of the image.
        channels: width of the embedding.
        norm_layer: norm of the channels-last map; none by default.
        kernel_size: pixels that a patch sees, `patch_size` by default. Larger patches overlap; at the border the image
            is continued by its outermost pixels.
        fixed_size: the model mixes a fixed number of tokens: patches must tile the image, and inputs must have
            `img_size`. Otherwise inputs of any size are taken, padded with zeros to whole patches.

    Attributes:
        further_stride: by how much the model divides the map further. An image of which its last map would hold more
            padding than pixels is refused.

    Raises:
        ValueError: with `fixed_size`, for a size no patch grid fits, naming the nearest that do, and for such an input;
            for an input too small for the last map; for a kernel smaller than the patch; for an input without a batch.
    """

    further_stride = 1

    kernel_size: tuple[int, int]
    # timm's attributes; the last two are those of models of a fixed size.
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_patches: int

    def __init__(
        self,
        img_size: int | tuple[int, int] | None,
        patch_size: int | tuple[int, int],
        in_chans: int,
        channels: int,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        kernel_size: int | tuple[int, int] | None = None,
        fixed_size: bool,
    ) -> None:
        image, patch = None if img_size is None else pair(img_size, "img_size"), pair(patch_size, "patch_size")
        kernel = patch if kernel_size is None else pair(kernel_size, "patch_kernel")
        if fixed_size:
            if image is None:
                raise ValueError("img_size is needed: this model mixes a fixed number of tokens")
            check_patches_tile(image, patch)
        _check_kernel(kernel, patch)
        super().__init__(
            image if fixed_size else None,
            patch,  # type: ignore[arg-type]  (timm takes a pair as well)
            in_chans,
            channels,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        # Not read from `proj`, which an adapter may wrap.
        self.kernel_size = kernel
        if kernel != patch:
            self.proj = nn.Conv2d(in_chans, channels, kernel, stride=patch)
        if norm_layer is not None:
            self.norm = norm_layer(channels)

    def grid_at(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> tuple[int, int] | None:
        """(rows, columns) of the patches of another image size or patch size; None where images of any size are taken.

        Raises:
            ValueError: for a size no patch grid fits.
        """
        if self.img_size is None:
            return None
        image = self.img_size if img_size is None else pair(img_size, "img_size")
        patch = self.patch_size if patch_size is None else pair(patch_size, "patch_size")
        check_patches_tile(image, patch)
        return image[0] // patch[0], image[1] // patch[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        kernel_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size, or patches of another size or kernel, whose weights timm's function resamples.

        What is None stays as it is; the kernel becomes the patch size where that is named.

        Raises:
            ValueError: as for the constructor; or if the weights that would change are computed from others.
        """
        convolution = self.proj
        patch = self.patch_size if patch_size is None else pair(patch_size, "patch_size")
        kernel = self.kernel_size if patch_size is None else patch
        kernel = kernel if kernel_size is None else pair(kernel_size, "patch_kernel")
        _check_kernel(kernel, patch)
        changes = (kernel, patch) != (self.kernel_size, self.patch_size)
        if changes and convolution._parameters.get("weight") is None:
            raise ValueError(
                "the patch embedding cannot be given other patches: its proj has no weight of its own (by weight norm, "
                "an adapter or quantisation); take that off first, and put it on again afterwards"
            )
        if grid := self.grid_at(img_size, patch_size):
            self.grid_size, self.num_patches = grid, grid[0] * grid[1]
            self.img_size = (grid[0] * patch[0], grid[1] * patch[1])
        elif img_size is not None:
            _check_not_too_small(pair(img_size, "img_size"), [side * self.further_stride for side in patch])
        if kernel != self.kernel_size:
            weight = resample_patch_embed(convolution.weight.detach(), list(kernel))
            convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
        if changes:
            convolution.kernel_size, convolution.stride = kernel, patch
        self.kernel_size, self.patch_size = kernel, patch

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch rows columns channels"]:
        if x.ndim != 4:
            raise ValueError(f"images are [batch, channels, height, width], got {list(x.shape)}; a batch may be of one")
        if self.img_size is not None and x.shape[-2:] != self.img_size:
            raise ValueError(
                f"the image is {_size(x.shape[-2:])} pixels, this model was built for {_size(self.img_size)}; "
                "build it with img_size=(height, width), or give it to set_input_size"
            )
        if self.img_size is None:
            # A graph for free sizes cannot look at one.
            if not torch.compiler.is_exporting() and not torch.jit.is_tracing():
                _check_not_too_small(x.shape[-2:], [side * self.further_stride for side in self.patch_size])
            x = _pad_to_patches(x, self.patch_size)
        high, wide = (kernel - patch for kernel, patch in zip(self.kernel_size, self.patch_size, strict=True))
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2), mode="replicate")
        return self.norm(_convolved(self.proj, x).permute(0, 2, 3, 1).contiguous())


class PatchMerging(nn.Module):
    """Halve the map: each 2×2 neighbourhood's channels side by side, normalised, projected to `out_channels`.

    The order is (h0 w0, h1 w0, h0 w1, h1 w1), as in AS-MLP's checkpoints. Odd sizes are padded with zeros below and on
    the right.

    Args:
        channels: width of the input.
        out_channels: width of the output.
        norm_layer: norm of the concatenated `4 · channels`.
    """

    def __init__(self, channels: int, out_channels: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm_layer(4 * channels)
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch half_height half_width out_channels"]:
        x = _pad_to_patches(x.permute(0, 3, 1, 2), (2, 2)).permute(0, 2, 3, 1)
        # B batch, H and W halved sizes, y and x position inside the neighbourhood
        x_BHyWxC = x.unflatten(2, (x.shape[2] // 2, 2)).unflatten(1, (x.shape[1] // 2, 2))
        return mapped(self.reduction, self.norm(x_BHyWxC.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class PatchDownsampling(nn.Module):
    """Halve the map by a 2×2 convolution of stride 2: the second patch embedding of ViP and S²-MLPv2.

    Odd sizes are padded with zeros below and on the right.

    Args:
        channels: width of the input.
        out_channels: width of the output.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out_channels, kernel_size=2, stride=2)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch half_height half_width out_channels"]:
        x = _pad_to_patches(x.permute(0, 3, 1, 2), (2, 2))
        return _convolved(self.proj, x).permute(0, 2, 3, 1).contiguous()


def _convolved(
    convolution: nn.Module, x: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch out_channels rows columns"]:
    """`convolution(x)`, in 16 bits multiplied as the other products are (see `ops.products`)."""
    plain = type(convolution) is nn.Conv2d and not is_watched(convolution)
    if plain and multiplies_in_float32(x, convolution.weight, convolution.bias):
        return multiply(convolution._conv_forward, x, convolution.weight, convolution.bias)
    return convolution(x)


def _pad_to_patches(
    x: Float[Tensor, "batch channels height width"], patch_size: tuple[int, int]
) -> Float[Tensor, "batch channels padded_height padded_width"]:
    """Zeros below and on the right, up to whole patches."""
    height, width = x.shape[2:]
    # Written for graphs of free sizes: they do not ask whether it pads, which would be answered for one size, and are
    # without a negative division, where ONNX rounds up and Python down.
    below = (height + patch_size[0] - 1) // patch_size[0] * patch_size[0] - height
    right = (width + patch_size[1] - 1) // patch_size[1] * patch_size[1] - width
    whole = below + right == 0
    if torch.compiler.is_compiling():
        whole = statically_known_true(whole)
    if whole and not torch.jit.is_tracing():
        return x
    return F.pad(x, (0, right, 0, below))


def check_patches_tile(img_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise ValueError unless whole patches tile the image; the message names the nearest sizes that do."""
    if all(size % patch == 0 for size, patch in zip(img_size, patch_size, strict=True)):
        return
    below = tuple(max(size // patch, 1) * patch for size, patch in zip(img_size, patch_size, strict=True))
    above = tuple(-(-size // patch) * patch for size, patch in zip(img_size, patch_size, strict=True))
    nearest = " and ".join(dict.fromkeys((_size(below), _size(above))))
    raise ValueError(
        f"an image of {_size(img_size)} pixels cannot be cut into patches of {_size(patch_size)}; "
        f"each side must be a multiple of its patch's: the nearest sizes are {nearest}"
    )


def _check_not_too_small(img_size: Sequence[int], stride: Sequence[int]) -> None:
    least = [-(-side // 2) for side in stride]
    if img_size[0] < least[0] or img_size[1] < least[1]:
        raise ValueError(
            f"an image of {_size(img_size)} pixels is too small for this model's last stage: "
            f"it needs at least {_size(least)}"
        )


def _check_kernel(kernel_size: Sequence[int], patch_size: Sequence[int]) -> None:
    if any(kernel < patch for kernel, patch in zip(kernel_size, patch_size, strict=True)):
        raise ValueError(
            f"a kernel of {_size(kernel_size)} pixels leaves pixels unseen between patches of {_size(patch_size)}; "
            "it must be as large as they are, or larger"
        )


def pair(size: Any, name: str) -> tuple[int, int]:
    """(height, width) of a size in pixels given as one number or as both.

    Raises:
        ValueError: for anything else; the message calls it `name`.
    """
    sides = size if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(is_whole(side, 1) for side in sides):
        raise ValueError(f"{name} must be a number of pixels from 1 on, or (height, width), got {shown(size)}")
    return int(sides[0]), int(sides[1])


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number, Python's or numpy's, from `least` on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"
