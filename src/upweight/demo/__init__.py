"""The embedded default: controlled sentiment with a model and prompts that ship with the project."""
