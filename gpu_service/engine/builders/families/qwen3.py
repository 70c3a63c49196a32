"""`qwen3`: Qwen 3."""

from transformers import Qwen3Config, Qwen3ForCausalLM

CONFIG_CLASS = Qwen3Config
MODEL_CLASS = Qwen3ForCausalLM
