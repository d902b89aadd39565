"""The report of a run: the HTML page, curves.png, regions.png and the final table."""
