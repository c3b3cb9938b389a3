"""Attention masks of prefix trees, against the definition for every pair of tokens."""

import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from stasc.training.masks import prefix_tree_mask_mod, prefix_tree_masks
from stasc.training.prefix_tree import PrefixTree, prefix_tree

CONFIGS = {
    None: LlamaConfig(),
    1: Phi3Config(pad_token_id=0, sliding_window=1),
    4: Phi3Config(pad_token_id=0, sliding_window=4),
    200: Phi3Config(pad_token_id=0, sliding_window=200),
}
"""A model for each width of the sliding window."""


def random_tree(seed: int, longest: int = 12) -> tuple[list[list[int]], PrefixTree]:
    draw = random.Random(seed)
    sequences = [draw.choices([0, 1], k=draw.randint(1, longest)) for _ in range(draw.randint(1, 10))]
    return sequences, prefix_tree(sequences)


def large_tree() -> tuple[list[list[int]], PrefixTree]:
    """More than the 128 tokens of one of FlexAttention's blocks, with branches that end inside of blocks."""
    draw = random.Random(0)
    prefix = draw.choices(range(50), k=70)
    middle = [prefix + draw.choices(range(50), k=90) for _ in range(2)]
    sequences = [path + draw.choices(range(50), k=60) for path in middle for _ in range(3)]
    return sequences, prefix_tree(sequences)


def expected_mask(sequences: list[list[int]], tree: PrefixTree, window: int | None) -> Tensor:
    """Which token attends to which, read off the sequences alone."""
    prefixes = {}  # of each token in the layout the sequence that ends with it
    for sequence, path in zip(sequences, tree.paths, strict=True):
        for depth, index in enumerate(path.tolist()):
            prefixes[index] = sequence[: depth + 1]
    size = len(prefixes)
    expected = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            ahead = len(prefixes[query]) - len(prefixes[key])
            is_prefix = prefixes[query][: len(prefixes[key])] == prefixes[key]
            expected[query, key] = is_prefix and (window is None or ahead < window)
    return expected


def masks(config: PreTrainedConfig, tree: PrefixTree, *, flex: bool):
    depths, subtree_ends = torch.from_numpy(tree.depths), torch.from_numpy(tree.subtree_ends)
    return prefix_tree_masks(config, depths, subtree_ends, flex=flex)


@pytest.mark.parametrize("window", CONFIGS)
@pytest.mark.parametrize("seed", range(10))
def test_dense_masks_are_right_for_every_pair(seed, window):
    sequences, tree = random_tree(seed)
    found = masks(CONFIGS[window], tree, flex=False)
    assert found.shape == (1, 1, len(tree.tokens), len(tree.tokens))
    assert torch.equal(found[0, 0], expected_mask(sequences, tree, window))


@pytest.mark.parametrize("window", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_mask_function_of_flex_attention_is_right_for_every_pair(seed, window):
    sequences, tree = random_tree(seed)
    expected = expected_mask(sequences, tree, window)
    depths, subtree_ends = torch.from_numpy(tree.depths), torch.from_numpy(tree.subtree_ends)
    mask_mod = prefix_tree_mask_mod(depths, subtree_ends, window)
    zero = torch.tensor(0)
    for query, row in enumerate(expected):
        for key, attends in enumerate(row):
            assert mask_mod(zero, zero, torch.tensor(query), torch.tensor(key)) == attends


@pytest.mark.parametrize("window", [None, 4, 200])
def test_block_masks_skip_exactly_the_blocks_in_which_nothing_attends(window):
    sequences, tree = large_tree()
    expected = expected_mask(sequences, tree, window)
    found = masks(CONFIGS[window], tree, flex=True)
    blocks = found.to_dense()[0, 0].bool()
    size = found.BLOCK_SIZE[0]
    assert len(blocks) == -(-len(expected) // size) > 3
    indices = torch.arange(len(expected))
    assert torch.equal(found.mask_mod(None, None, indices[:, None], indices), expected)
    for row in range(len(blocks)):
        for column in range(len(blocks)):
            block = expected[row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert blocks[row, column] == block.any()
    assert not blocks.all()


def test_each_type_of_layer_has_its_mask():
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=2, max_window_layers=1)
    sequences, tree = random_tree(3)
    found = masks(config, tree, flex=False)
    assert found.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(found["full_attention"][0, 0], expected_mask(sequences, tree, None))
    assert torch.equal(found["sliding_attention"][0, 0], expected_mask(sequences, tree, 2))


def test_other_types_of_layer_are_refused():
    config = Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="no mask for chunked_attention layers"):
        masks(config, random_tree(0)[1], flex=False)
