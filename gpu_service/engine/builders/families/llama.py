"""`llama`: Llama and models of its shape."""

from transformers import LlamaConfig, LlamaForCausalLM

CONFIG_CLASS = LlamaConfig
MODEL_CLASS = LlamaForCausalLM
