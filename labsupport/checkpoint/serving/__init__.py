"""A checkpoint behind an OpenAI-compatible port: which engine can serve it here, a small server of our own, and the launcher."""
