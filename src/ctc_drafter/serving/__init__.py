"""An OpenAI-compatible server and a chat in the terminal; needs the extra `serve`, and is imported only when used."""
