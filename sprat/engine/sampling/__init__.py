"""From logits to tokens: array operations, the sampler of all slots, and the processors of single requests."""
