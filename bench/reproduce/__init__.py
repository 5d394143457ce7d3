"""Published results, predicted again: each script prints published, ours and the error."""
