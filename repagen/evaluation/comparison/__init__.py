"""Results side by side: which are alike, their table, their plot, and epochs to a figure."""
