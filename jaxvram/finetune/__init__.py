"""Wrappers round untouched models: LoRA, DoRA, a base in NF4, LLaMA-Adapter."""
