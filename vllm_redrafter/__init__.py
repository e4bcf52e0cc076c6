"""ReDrafter speculative decoding for vLLM: a recurrent drafter, a token tree, and a verification that changes nothing."""

__version__ = "0.1.0"
