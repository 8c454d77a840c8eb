"""Where responses come from: the policy itself, or a vLLM server."""
