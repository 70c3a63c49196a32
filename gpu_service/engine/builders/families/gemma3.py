"""`gemma3`: Gemma 3's text models."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

CONFIG_CLASS = Gemma3TextConfig
MODEL_CLASS = Gemma3ForCausalLM
