"""GGUF files in: their header checked, their tensors decoded in a process of its own, their vocabulary as ours."""
