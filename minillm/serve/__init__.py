"""The engine behind HTTP: OpenAI's completions and chat, streamed or whole."""
