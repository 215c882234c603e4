"""The embedded default: controlled sentiment a small model, prompts and answers."""
