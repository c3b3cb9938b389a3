"""Fine-tuning on D_n (step 4 of Algorithm 1), the counterpart of ``stasc.sampling``.

- ``batches``: from the examples of D_n to optimiser steps, micro-batches and their tensors
- ``prefix_tree``: several token sequences in one row, every shared prefix once
- ``masks``: attention masks for prefix-tree batches
- ``loss``: weighted negative log-likelihood of a batch's targets, in bounded memory
- ``lora``: low-rank adapters, and merging them into plain weights
- ``weights``: weights from a model folder into a strategy's model, and back into a folder as M_n
- ``module``: ``CorrectionSFT``, the LightningModule that ties these together
"""
