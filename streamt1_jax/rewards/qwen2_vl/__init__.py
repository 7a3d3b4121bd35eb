"""Qwen2-VL as the backbone of reward models."""
