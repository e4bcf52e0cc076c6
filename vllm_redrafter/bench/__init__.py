"""Measuring: models of a realistic size that behave like small ones, and speed side by side with plain vLLM."""
