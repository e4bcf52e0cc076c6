"""Everything that knows vLLM: a vLLM upgrade can break what is in this folder, and nothing else."""
