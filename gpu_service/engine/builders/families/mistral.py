"""`mistral`: Mistral."""

from transformers import MistralConfig, MistralForCausalLM

CONFIG_CLASS = MistralConfig
MODEL_CLASS = MistralForCausalLM
