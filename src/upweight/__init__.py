"""upweight: align language models with preferences."""
