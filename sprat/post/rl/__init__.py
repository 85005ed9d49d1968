"""Reinforcement learning with rewards that can be checked: losses, rollouts, verifiers, the trainer."""
