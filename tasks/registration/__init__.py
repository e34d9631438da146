"""The policy as a registered version: its record in MLflow, its page, and what people decided on it."""
