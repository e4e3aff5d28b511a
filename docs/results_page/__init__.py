"""docs/results.md: the record of a run, and the tables and the figure of all records."""
