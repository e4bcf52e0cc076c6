"""Token trees under vLLM's model runner V2: everything on the device, of fixed shape, with async scheduling."""
