"""How does it reason and teach? SFT, rewards, GRPO, distillation, evaluation and the control beside them."""
