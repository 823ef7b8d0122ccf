"""Hugging Face: weights and configurations both ways."""
