"""Find, read and compare runs; print tables, draw curves, write a report. Nothing here imports torch."""
