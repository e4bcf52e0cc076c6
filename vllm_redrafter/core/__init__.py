"""The whole algorithm in plain torch, without vLLM: read these files and you know ReDrafter."""
