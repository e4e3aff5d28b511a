"""Runs side by side: found, read, filtered; shown as tables, curves and a page. Nothing here needs torch."""
