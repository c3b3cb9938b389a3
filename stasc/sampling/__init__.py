"""Sampling engines: from prompt token ids to completion token ids."""

from stasc.sampling.base import Draw, Request, Sampler, Sampling
from stasc.sampling.transformers import TransformersSampler
from stasc.sampling.vllm import VLLMSampler

__all__ = ["Draw", "Request", "Sampler", "Sampling", "TransformersSampler", "VLLMSampler"]
