"""Floor 7: the OpenAI interface over the engine. The engine has its own process; the server's never imports torch."""
