"""What the probes' answers come to: who is asked, how subjects compare, what the gate says."""
