"""Simulated vLLM engines: which order and which guard, before a GPU is asked."""
