"""The program `vllm-redrafter`: one file per sub-command; engines run in child processes, stdout holds the result."""
