"""Pretrained models in and out: Hugging Face folders and GGUF."""
