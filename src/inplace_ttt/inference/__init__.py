"""Use a trained model: read books, generate, chat."""
