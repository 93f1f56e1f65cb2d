"""What the parts cost, measured against their alternatives; `python -m pipeline.bench`."""
