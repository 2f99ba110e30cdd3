"""Text to tokens and back: prompts, chat templates, transcripts, streamed output."""
