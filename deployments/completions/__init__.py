"""OpenAI's chat completions and completions: their requests and their answers."""
