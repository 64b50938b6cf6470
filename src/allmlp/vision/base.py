"""What every vision family shares: patch embedding → blocks → norm → pooling → head, behind timm's model interface."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from allmlp.allocator import keep_freed_memory
from allmlp.layers import PatchEmbedding
from allmlp.layers.batch_slices import runs_in_slices, slice_size
from allmlp.layers.patch_embedding import pair
from allmlp.vision.resolution import grid_bound_layers, resample_state_dict

POOLINGS = ("avg", "")


class VisionMLP(nn.Module):
    """An all-MLP image model on channels-last maps `[batch, height, width, channels]`.

    The blocks lie in one flat sequence, downsampling layers among them; a feature level is the output of one of them.

    Args:
        stem: image to map.
        blocks: maps to maps, in order.
        levels: (index into `blocks`, channels, reduction in pixels) of every feature level.
        norm: the norm before pooling.
        num_classes: outputs of the head; 0 leaves the head out.
        drop_rate: dropout rate in front of the head.
        global_pool: `"avg"` averages over positions, `""` returns the map (and applies the head to every position).
    """

    # timm reads these two to find the channels of a feature map.
    output_fmt = "NHWC"
    feature_dim = -1

    def __init__(
        self,
        *,
        stem: PatchEmbedding,
        blocks: Sequence[nn.Module],
        levels: Sequence[tuple[int, int, int]],
        norm: nn.Module,
        num_classes: int,
        drop_rate: float,
        global_pool: str,
    ) -> None:
        super().__init__()
        keep_freed_memory()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.in_chans = stem.proj.in_channels
        self.num_features = self.head_hidden_size = self.embed_dim = levels[-1][1]
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": channels, "reduction": reduction}
            for index, channels, reduction in levels
        ]
        self.level_indices = [index for index, _, _ in levels]
        stem.further_stride = levels[-1][2] // max(stem.patch_size)
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Head from a truncated normal (std 0.02), other linear maps Glorot-uniform, zero biases.

        Args:
            needs_reset: layers that are no `nn.Linear` begin anew as well, by the rule of their own; a new model has
                just done so, one brought from the meta device by `to_empty` has not.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name == "head":
                    trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone beside the one-dimensional ones: the spatial biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("sgu.bias")}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Patterns that give each parameter its depth, for layer-wise learning-rate decay."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward in place of keeping its activations."""
        self.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_kernel: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size: weights that belong to positions are resampled, in place (docs/resolution.md).

        Families without such weights take any size as they are. Parameters that change are new ones: an optimizer must
        be made anew.

        Args:
            img_size: image size in pixels, one number or (height, width); as it is where None.
            patch_size: patch size likewise; the patch embedding is resampled.
            patch_kernel: pixels that a patch sees, `patch_size` where only that is named. Where pictures are enlarged,
                a kernel enlarged as much shows the blocks what they know.

        Raises:
            ValueError: for a size no patch grid fits, naming the nearest that do; for a kernel smaller than the patch;
                for a layer whose weights are computed from others. The model is then as it was.
        """
        patch, grid = max(self.stem.patch_size), self.stem.grid_size
        new_grid = self.stem.grid_at(img_size, patch_size)
        bound = grid_bound_layers(self.blocks, grid, new_grid) if new_grid and new_grid != grid else ()
        # Made before anything changes: blocks may share parameters, and those of the last one may be refused.
        made: dict[nn.Parameter, nn.Parameter] = {}
        changes = [
            (layer, old, new, layer.resampled_parameters(old, new, made, name)) for name, layer, old, new in bound
        ]
        self.stem.set_input_size(img_size, patch_size, patch_kernel)
        for layer, old, new, parameters in changes:
            layer.set_grid_size(old, new, parameters)
        for info in self.feature_info:
            info["reduction"] = info["reduction"] // patch * max(self.stem.patch_size)
        # What prepares images for the model reads their size in timm's configuration.
        cfg = getattr(self, "pretrained_cfg", None)
        if cfg and img_size is not None:
            cfg["input_size"] = (cfg["input_size"][0], *pair(img_size, "img_size"))
        self._record_arguments(img_size, patch_size, patch_kernel)

    def _record_arguments(self, img_size: Any, *patches: Any) -> None:
        """Where timm looks them up, the arguments that make a model of this form: it writes them beside the weights."""
        changed: dict[str, Any] = {}
        if img_size is not None:
            changed["img_size"] = pair(img_size, "img_size")
            self._traits = {**getattr(self, "_traits", {}), **changed}
        if any(size is not None for size in patches):
            changed |= {"patch_size": self.stem.patch_size, "patch_kernel": self.stem.kernel_size}
        self._model_args = {**getattr(self, "_model_args", {}), **changed}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """torch's step for this module, wherever it stands in what is loaded: `resample_state_dict` comes first.

        Raises:
            ValueError: if the weights do not tell the grid they were trained on; the message asks for it.
        """
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        state_dict.update({prefix + key: value for key, value in resample_state_dict(own, self).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs (0: none), and the pooling where one is named."""
        if global_pool is not None:
            if global_pool not in POOLINGS:
                raise ValueError(f"global_pool must be one of {POOLINGS}, got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Identity()
        if num_classes > 0:
            like = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.train(self.training)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch chans height width"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the model, keeping the maps of feature levels.

        Args:
            x: images.
            indices: the last n levels for a number, all for None, else those named, in their order.
            norm: apply the final norm to the kept maps of its width.
            stop_early: stop behind the last kept level.
            output_fmt: `"NCHW"` or `"NHWC"`, the layout of the kept maps.
            intermediates_only: return the kept maps alone.

        Returns:
            The kept maps, or (final map, kept maps); the final map is normalised where it has the norm's width.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.level_indices), indices)
        wanted = [self.level_indices[level] for level in take]
        stop = self.level_indices[last] + 1 if stop_early else len(self.blocks)
        found = {}
        x = self.stem(x)
        for index, block in enumerate(self.blocks[:stop]):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if index in wanted:
                found[index] = self._normalised(x) if norm else x
        kept = [found[index] for index in wanted]
        if output_fmt == "NCHW":
            kept = [y.permute(0, 3, 1, 2).contiguous() for y in kept]
        if intermediates_only:
            return kept
        return self._normalised(x), kept

    def _normalised(
        self, x: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """The map behind the final norm where it has the norm's width; earlier stages are narrower."""
        return self.norm(x) if x.shape[-1] == self.num_features else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what lies behind the named feature levels, norm and head where asked; returns the levels kept.

        Where the last level kept has another width than the norm and the head, they go whatever is asked.
        """
        take, last = feature_take_indices(len(self.level_indices), indices)
        channels = self.feature_info[last]["num_chs"]
        fits = channels == self.num_features
        self.num_features = self.head_hidden_size = self.embed_dim = channels
        self.blocks = self.blocks[: self.level_indices[last] + 1]
        # Later levels are gone: the last n are now among those in front.
        del self.level_indices[last + 1 :], self.feature_info[last + 1 :]
        if isinstance(self.stem, PatchEmbedding):
            self.stem.further_stride = self.feature_info[last]["reduction"] // max(self.stem.patch_size)
        if prune_norm or not fits:
            self.norm = nn.Identity()
        if prune_head or not fits:
            self.reset_classifier(0, "")
        return take

    def forward_features(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """The normalised last map."""
        x = self.stem(x)
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        elif runs_in_slices(self, x):
            x = self._blocks_in_slices(x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def _blocks_in_slices(
        self, x: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch out_rows out_columns out_channels"]:
        """`self.blocks(x)` for a few samples at a time; samples do not meet in any block."""
        batch, slices = x.shape[0], (x,)
        for block in self.blocks:
            size, current = slice_size(slices[0], batch), slices[0].shape[0]
            if size > current or (len(slices) == 1 and size < current):
                slices = torch.cat(slices).split(size)
            slices = tuple(block(part) for part in slices)
        return torch.cat(slices)

    def forward_head(self, x: Float[Tensor, "batch rows columns channels"], pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it; `pre_logits` stops in front of the head."""
        if self.global_pool == "avg":
            x = x.mean((1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Tensor:
        """Logits `[batch, classes]`; without a head the pooled features, without pooling a map."""
        return self.forward_head(self.forward_features(x))


def column_levels(depth: int, channels: int, patch_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """The feature levels of a column of equal blocks: every block."""
    return [(index, channels, max(patch_size)) for index in range(depth)]


def depth_decayed(drop_path_rate: float, depth: int) -> list[float]:
    """Stochastic depth rates rising linearly from 0 in the first block to `drop_path_rate` in the last."""
    return torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
