"""A tuned model in use: it answers a person, a file of prompts, or a test set."""
