"""What `features_only=True` can put on a model's maps, behind timm's interface: norms, or a simple feature pyramid."""

from functools import partial

from jaxtyping import Float
from timm.models._features import FeatureGetterNet, FeatureInfo, feature_take_indices
from torch import Tensor, nn

from allmlp.layers import SimpleFeaturePyramid
from allmlp.vision.base import VisionMLP

LEVELS = 4


class NormalisedFeatureNet(FeatureGetterNet):
    """A model's maps, each behind a norm of its own, as in AS-MLP's detection and segmentation backbones.

    The norms are of the kind of the model's final norm, and have its epsilon.

    Args:
        model: the backbone, of which the body is kept.
        out_indices: the levels wanted, the last n for a number.
        output_fmt: `"NCHW"`, the layout of the maps.

    Raises:
        ValueError: if the model has no final norm.
    """

    model: VisionMLP

    def __init__(self, model: VisionMLP, out_indices: int | tuple[int, ...], output_fmt: str = "NCHW") -> None:
        if isinstance(model.norm, nn.Identity):
            raise ValueError(
                "feature_norms=True puts norms like the model's final one on its maps; this model has none"
            )
        # An Affine has no epsilon.
        epsilon = {"eps": model.norm.eps} if hasattr(model.norm, "eps") else {}
        norm_layer = partial(type(model.norm), **epsilon)
        super().__init__(model, out_indices=out_indices, output_fmt=output_fmt)
        self.norms = nn.ModuleList(norm_layer(channels) for channels in self.feature_info.channels())

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        levels = list(self.feature_info.out_indices)
        maps = self.model.forward_intermediates(x, levels, output_fmt="NHWC", intermediates_only=True)
        return [norm(y).permute(0, 3, 1, 2).contiguous() for norm, y in zip(self.norms, maps, strict=True)]


class SimpleFeaturePyramidNet(FeatureGetterNet):
    """Four maps of equal width from a model's last one, as detectors take them; see `layers.SimpleFeaturePyramid`.

    Their strides double from level to level; `pyramid_strides` says from where.

    Args:
        model: the backbone, of which the body is kept.
        out_indices: the levels wanted, the last n for a number.
        pyramid_channels: width of every level.
        output_fmt: `"NCHW"`, the layout of the maps.

    Raises:
        ValueError: if `pyramid_channels` is not positive.
    """

    def __init__(
        self,
        model: VisionMLP,
        out_indices: int | tuple[int, ...] = LEVELS,
        pyramid_channels: int = 256,
        output_fmt: str = "NCHW",
    ) -> None:
        if pyramid_channels < 1:
            raise ValueError(f"pyramid_channels must be positive, got {pyramid_channels}")
        super().__init__(model, out_indices=(-1,), output_fmt=output_fmt)
        (channels,), (stride,) = self.of_the_map.channels(), self.of_the_map.reduction()
        self.scales = [stride / level for level in pyramid_strides(stride)]
        self.taken, _ = feature_take_indices(LEVELS, out_indices)  # type: ignore[arg-type]  (tuples are taken as well)
        self.pyramid = SimpleFeaturePyramid(channels, pyramid_channels, [self.scales[level] for level in self.taken])
        self.pyramid_channels = pyramid_channels

    @property
    def feature_info(self) -> FeatureInfo:
        """timm's description of the levels. Their strides go with the map's, which other patches change."""
        (stride,) = self.of_the_map.reduction()
        levels = [
            {"module": "pyramid", "num_chs": self.pyramid_channels, "reduction": _whole(stride / scale)}
            for scale in self.scales
        ]
        return FeatureInfo(levels, tuple(self.taken))

    @feature_info.setter
    def feature_info(self, of_the_map: FeatureInfo) -> None:
        # What timm's constructor says of the map itself.
        self.of_the_map = of_the_map

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> list[Float[Tensor, "batch channels _ _"]]:
        (last,) = super().forward(x)
        return self.pyramid(last)


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def pyramid_strides(stride: int) -> list[int]:
    """The strides of the pyramid on a map of this stride, in pixels.

    They are doubled from the smallest whole number of at least 4 that reaches `stride` so: 4, 8, 16, 32 for powers of
    two; 7, 14, 28, 56 for 14.
    """
    finest = stride
    while finest < 4:
        finest *= 2
    while finest % 2 == 0 and finest >= 8:
        finest //= 2
    return [finest * 2**level for level in range(LEVELS)]
