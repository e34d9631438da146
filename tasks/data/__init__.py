"""Feedback, prompts and the probes' items: from the sources that params.yaml names to tables that share nothing."""
