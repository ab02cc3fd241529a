"""The shipped configurations. A package, so that an editable install finds them as an installed one does."""
