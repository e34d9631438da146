"""Completions looked at token by token, as PPO sees them, and the picture of it."""
