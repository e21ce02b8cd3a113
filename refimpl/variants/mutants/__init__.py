"""The mistakes of real ports, as changes: one file for each subject."""
