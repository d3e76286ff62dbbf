"""The JSON file of a run, and the runs that a comparison needs."""
