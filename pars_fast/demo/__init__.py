"""The demo: a real vLLM server, real prompts, three policies, one page."""
