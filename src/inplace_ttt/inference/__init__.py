"""Use trained models: save fast weights as books, generate text, chat."""
