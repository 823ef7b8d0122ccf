"""Inference with trained models: save fast weights as books, generate text, chat."""
