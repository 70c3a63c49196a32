"""`code_llama`: CodeLlama, whose config and layers are Llama's."""

from transformers import LlamaConfig, LlamaForCausalLM

CONFIG_CLASS = LlamaConfig
MODEL_CLASS = LlamaForCausalLM
