"""Families of language models in small: architecture, tokenizer and chat template, each in its own way.

The chat templates are written anew, to do with the messages what those of the hub's models do. Each
``config.json`` has the keys of the hub's files, which are older than those that transformers writes today.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import PHI3_TEMPLATE, QWEN_TEMPLATE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen2Tokenizer

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

# Its own system message stands where the conversation has none.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM, a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# No system message of its own; thinking is off by an empty thought in the prompt; old thoughts are dropped.
QWEN3_TEMPLATE = """
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.last %}
        {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# A system message in any case, with the date in it; contents are stripped.
LLAMA3_TEMPLATE = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
# The system message is put before the first user message; the assistant is called model; roles alternate.
GEMMA3_TEMPLATE = """
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Args:
        recipes: Pattern of their files in ``configs/models``.
        template: The chat template.
        eos: The tokenizer's end of a sequence.
        specials: Its other special tokens.
        bos: Its beginning of a sequence.
        words: Tokens that are not special.
        config: ``config.json``, without the sizes that all families here share.
        vocabulary: How many more tokens the model has than the tokenizer.
        ends: Tokens that end a completion, by generation_config.json.
    """

    recipes: str
    template: str
    eos: str
    specials: list[str]
    config: dict[str, Any]
    bos: str | None = None
    words: list[str] = field(default_factory=list)
    vocabulary: int = 0
    ends: list[str] = field(default_factory=list)

    def tokenizer(self) -> Qwen2Tokenizer:
        """Byte-level, with the special tokens and the chat template of the family."""
        tokenizer = Qwen2Tokenizer(
            vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))},
            merges=[],
            unk_token=None,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token="<|pad|>",
            extra_special_tokens=[token for token in self.specials if token not in (self.bos, self.eos)],
            chat_template=self.template,
        )
        tokenizer.add_tokens(self.words)
        return tokenizer

    def make(self, folder: Path) -> Path:
        """A random model of the family as a Hugging Face folder."""
        tokenizer = self.tokenizer()
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        config = {
            "vocab_size": len(tokenizer) + self.vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "float32",
            **self.config,
        }
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # else all of them are alike
                    parameter += torch.linspace(-0.3, 0.3, len(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        ends = tokenizer.convert_tokens_to_ids(self.ends)
        GenerationConfig(bos_token_id=bos, eos_token_id=[eos, *ends], pad_token_id=pad).save_pretrained(
            folder
        )
        return folder


FAMILIES = {
    "smollm2": Family(
        "smollm2-*",
        SMOLLM2_TEMPLATE,
        "<|im_end|>",
        CHATML,
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_theta": 100000,
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        bos="<|im_start|>",
    ),
    "qwen2.5": Family(
        "qwen2.5-*",
        QWEN_TEMPLATE,
        "<|im_end|>",
        CHATML,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 21,
            "tie_word_embeddings": True,
        },
        vocabulary=7,
        ends=["<|endoftext|>"],
    ),
    "qwen3": Family(
        "qwen3-*",
        QWEN3_TEMPLATE,
        "<|im_end|>",
        CHATML,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 64,  # heads wider than the model, as those of Qwen3 0.6B
            "attention_bias": False,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "rms_norm_eps": 1e-6,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "tie_word_embeddings": True,
        },
        words=["<think>", "</think>"],
        vocabulary=7,
        ends=["<|endoftext|>"],
    ),
    "llama3.2": Family(
        "llama3.2-*",
        LLAMA3_TEMPLATE,
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>"],
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": 32,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 256,
                "rope_type": "llama3",
            },
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        bos="<|begin_of_text|>",
        ends=["<|end_of_text|>", "<|eom_id|>"],
    ),
    "gemma3": Family(
        "gemma3-*",
        GEMMA3_TEMPLATE,
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "head_dim": 64,
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 64,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 8,  # much shorter than the prompts
            "sliding_window_pattern": 2,  # the second of the three layers sees everything
        },
        bos="<bos>",
        words=["<image_soft_token>"],
        vocabulary=-1,  # which the text model does not have
        ends=["<end_of_turn>"],
    ),
    "phi3": Family(
        "phi3-*",
        PHI3_TEMPLATE,
        "<|endoftext|>",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
            "attention_bias": False,
            "original_max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
        vocabulary=7,
        ends=["<|end|>"],
    ),
}
