"""What runs on the GPU, in Triton: every kernel stands beside its twin in plain torch, under one name and signature."""
