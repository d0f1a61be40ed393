"""`pars-fast batch`: an offline job that completes a file of prompts, with or without knowing lengths."""
