"""Models behind OpenAI's HTTP interface, and the chat page."""
