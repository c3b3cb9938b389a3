"""Who attends to whom in a batch that is laid out as a prefix tree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

MaskMod = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
Mask = Tensor | BlockMask


def tree_masks(
    config: PreTrainedConfig, depths: Tensor, ends: Tensor, *, blocks: bool
) -> Mask | dict[str, Mask]:
    """Attention masks in the form that the models of transformers take ready-made.

    Args:
        config: Of the model; says which layers attend to a sliding window only.
        depths: Depth of each token in the tree, of shape [T].
        ends: End of each token's subtree, of shape [T].
        blocks: Block masks for FlexAttention instead of dense boolean masks of shape [1, 1, T, T].

    Returns:
        The mask of all layers, or those of each type of layer where a model has types.

    Raises:
        ValueError: The model has layers that attend in another way.
    """

    def mask(window: int | None) -> Mask:
        sees = _sees(depths, ends, window)
        if blocks:
            return create_block_mask(sees, None, None, len(ends), len(ends), device=ends.device)
        places = torch.arange(len(ends), device=ends.device)
        return sees(None, None, places[:, None], places[None, :])[None, None]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    windows = {"full_attention": None, "sliding_attention": window}
    if not types:
        return mask(window)
    if unknown := types - windows.keys():
        raise ValueError(f"no mask for {', '.join(sorted(unknown))} layers")
    return {kind: mask(windows[kind]) for kind in sorted(types)}


def _sees(depths: Tensor, ends: Tensor, window: int | None) -> MaskMod:
    """Whether place q attends to place k, for any shapes of q and k: FlexAttention asks for single places."""

    def sees(batch: Tensor | None, head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        along_the_branch = (k <= q) & (q < ends[k])
        return along_the_branch if window is None else along_the_branch & (depths[q] - depths[k] < window)

    return sees
