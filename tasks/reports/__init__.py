"""Pages that a person reads of a stage, each with a Markdown twin, and the pictures on them."""
