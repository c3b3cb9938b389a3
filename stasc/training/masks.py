"""Attention masks for prefix-tree batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

MaskMod = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
"""As FlexAttention calls it: (batch, head, query index, key index) to whether the query sees the key."""
Mask = Tensor | BlockMask


def prefix_tree_masks(
    config: PreTrainedConfig, depths: Tensor, subtree_ends: Tensor, *, flex: bool
) -> Mask | dict[str, Mask]:
    """Masks in the form that the models of transformers take instead of computing their own.

    Args:
        config: Of the model; says which layers have a sliding window.
        depths: Depth of each token in the tree, int64 of shape [T].
        subtree_ends: For each token the layout index behind its subtree, int64 of shape [T].
        flex: Make block masks for FlexAttention instead of dense boolean masks of shape [1, 1, T, T].

    Returns:
        One mask for all layers, or for a model with several types of layer a mask for each type.

    Raises:
        ValueError: The model has a type of layer other than full and sliding-window attention.
    """
    size = len(subtree_ends)

    def mask(window: int | None) -> Mask:
        mask_mod = prefix_tree_mask_mod(depths, subtree_ends, window)
        if flex:
            return create_block_mask(mask_mod, None, None, size, size, device=subtree_ends.device)
        indices = torch.arange(size, device=subtree_ends.device)
        return mask_mod(None, None, indices[:, None], indices[None, :])[None, None]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    windows = {"full_attention": None, "sliding_attention": window}
    if not types:
        return mask(window)
    if unknown := types - windows.keys():
        raise ValueError(f"no mask for {', '.join(sorted(unknown))} layers")
    return {kind: mask(windows[kind]) for kind in sorted(types)}


def prefix_tree_mask_mod(depths: Tensor, subtree_ends: Tensor, window: int | None) -> MaskMod:
    """A token attends to itself and its ancestors, within ``window`` tokens of its own sequence if given.

    The function takes index tensors of any shapes that broadcast: FlexAttention passes scalars.
    """

    def attends(batch: Tensor | None, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        is_ancestor = (key <= query) & (query < subtree_ends[key])
        return is_ancestor if window is None else is_ancestor & (depths[query] - depths[key] < window)

    return attends
