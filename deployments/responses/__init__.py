"""OpenAI's Responses and Conversations APIs: turns whose history the server keeps."""
